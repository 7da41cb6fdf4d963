"""Job scripts of an experiment for a machine, and a manifest with a hash of every file.

The same experiment, site and versions yield the same bytes: nothing here reads a clock.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment
from pydantic import Field

from axonn.config.loading import Line, Name, is_plain, load_json
from axonn.config.train_config import StrictModel
from axonn.durable_files import opened
from axonn.errors import ConfigError
from axonn.training.framework import ClusterWork, Launch
from axonn.training.run_folder import STOPPED
from experiments.cluster_work import SmallWork
from experiments.templates import rendered, sandbox
from jobscripts.launchers import Launcher
from jobscripts.schedulers import Resources, Scheduler
from jobscripts.site import Site, as_shell, as_words, in_quotes
from jobscripts.system import System

TEMPLATES = Path(__file__).parent / "templates"
MANIFEST = "manifest.json"
SCHEMA = "axonn-jobs/1"
_CHANGED_BY_SETUP = ("PATH", "LD_LIBRARY_PATH")
"""Variables that modules and activated environments set, beside those that the job exports."""


_OF_EVERY_JOB = ("job.sh", "rank.sh", "work.json")


class JobEntry(StrictModel):
    """One job of a manifest. `files`: sha256 of each, by its path from the manifest."""

    name: Name
    point: Line
    framework: Line
    """Label, as in records."""
    adapter: str
    nodes: int
    gpus: int
    node_hours: float
    """Most node-hours that the job may take."""
    files: dict[str, str]

    def model_post_init(self, context: Any) -> None:
        if missing := [name for name in _OF_EVERY_JOB if f"{self.name}/{name}" not in self.files]:
            raise ValueError(f"the files of {self.name} lack {', '.join(missing)}")
        for path in self.files:
            folder, _, name = path.partition("/")
            if folder != self.name or not is_plain(name):
                raise ValueError(f"{path!r} is no file of the job {self.name}")


class Manifest(StrictModel):
    """All jobs of a folder."""

    schema_: Literal["axonn-jobs/1"] = Field(default="axonn-jobs/1", alias="schema")
    experiment: Name
    machine: Name
    scheduler: str
    launcher: str
    command: str
    jobs: list[JobEntry]
    files: dict[Name, str] = {}
    """sha256 of the files that belong to no job."""


@dataclass(frozen=True, kw_only=True)
class ClusterJob:
    """A point to be run on a cluster. `adapter`: name of the adapter; for small work, of the framework."""

    name: str
    framework: str
    adapter: str
    work: ClusterWork | SmallWork
    launch: Launch
    resources: Resources


def write_jobs(
    jobs: Sequence[ClusterJob],
    folder: Path,
    *,
    experiment: str,
    command: str,
    system: System,
    site: Site,
    scheduler: Scheduler,
    launcher: Launcher,
    templates: Path | None = None,
) -> Manifest:
    """Write every job into a folder of its own, a script that submits all, and the manifest.

    `templates`: a folder with changed copies of ours; ours stand in for those that it lacks. Raises `ConfigError` when
    the folder has other files, so that nothing of the user's is overwritten, and where a template or a name is wrong;
    then nothing is written.
    """
    _check_names(jobs, experiment=experiment, machine=system.machine)
    _check_free(folder, jobs)
    environment = _environment(templates)
    contents: dict[str, str] = {}
    entries = []
    for job in jobs:
        files = _files_of(job, environment, system=system, site=site, scheduler=scheduler, launcher=launcher)
        contents |= {f"{job.name}/{name}": content for name, content in files.items()}
        entries.append(
            JobEntry(
                name=job.name,
                point=job.work.name,
                framework=job.framework,
                adapter=job.adapter,
                nodes=job.resources.nodes,
                gpus=job.work.gpus,
                node_hours=round(job.resources.node_hours, 3),
                files={f"{job.name}/{name}": _hash(content) for name, content in sorted(files.items())},
            )
        )
    everything = rendered(environment, "submit-all.sh.j2", {})
    manifest = Manifest(
        experiment=experiment,
        machine=system.machine,
        scheduler=scheduler.name,
        launcher=launcher.name,
        command=command,
        jobs=entries,
        files={"submit-all.sh": _hash(everything)},
    )
    text = json.dumps(manifest.model_dump(mode="json", by_alias=True), indent=1)
    for name, content in {**contents, "submit-all.sh": everything, MANIFEST: text + "\n"}.items():
        _write(folder / name, content)
    return manifest


def _environment(folder: Path | None) -> Environment:
    """Return the templates of `folder`, and ours where it has none of that name."""
    ours = sorted(path.name for path in TEMPLATES.glob("*.j2"))
    if folder is not None and not any((folder / name).is_file() for name in ours):
        raise ConfigError(f"{folder}: has no template; copy what you want to change of {TEMPLATES}: {', '.join(ours)}")
    return sandbox([*([] if folder is None else [folder]), TEMPLATES], autoescape=False, keep_trailing_newline=True)


def _check_names(jobs: Iterable[ClusterJob], *, experiment: str, machine: str) -> None:
    """Raise `ConfigError` for names that are no file names, or would be a line of their own in a script."""
    for kind, name in [("experiment", experiment), ("machine", machine), *(("job", job.name) for job in jobs)]:
        if not is_plain(name):
            raise ConfigError(f"{kind} {name!r}: name it with letters, digits, '.', '_' and '-' alone")
    for job in jobs:
        for label in (job.work.name, job.framework):
            if any(unicodedata.category(letter) in {"Cc", "Zl", "Zp"} for letter in label):
                raise ConfigError(f"{job.name}: the label {label!r} has control characters; write it in one line")
        if wrong := [name for name in job.launch.files if not is_plain(name)]:
            raise ConfigError(f"{job.name}: its launch has a file {wrong[0]!r}; give it a plain name")


def title_of(job: ClusterJob) -> str:
    """Return the title of a job in one line, whatever its labels contain."""
    size = f"{_count(job.work.gpus, 'rank')}, {_count(job.resources.nodes, 'node')}"
    return " ".join(f"{job.framework}: {job.work.name} on {size}".split())


def _check_free(folder: Path, jobs: Iterable[ClusterJob]) -> None:
    if not folder.exists():
        return
    ours = {MANIFEST, "submit-all.sh", *(job.name for job in jobs)}
    if (folder / MANIFEST).exists():
        ours |= {entry.name for entry in load_manifest(folder).jobs}
    if strangers := sorted(path.name for path in folder.iterdir() if path.name not in ours):
        raise ConfigError(f"{folder}: has other files ({', '.join(strangers[:3])}); choose an empty folder with --out")
    started = [path.parent.name for path in folder.glob("*/run")]
    if started:
        raise ConfigError(f"{folder}: {', '.join(sorted(started)[:3])} ran already; choose another folder with --out")


def _files_of(
    job: ClusterJob, environment: Environment, *, system: System, site: Site, scheduler: Scheduler, launcher: Launcher
) -> dict[str, str]:
    """Return the contents of a job's files by name."""
    common: dict[str, Any] = {
        "OMP_NUM_THREADS": job.resources.cores_per_rank,
        **system.environment,
        **(system.mpi_on_device if job.launch.mpi_on_device else {}),
        **job.launch.environment,
    }
    # The site's variables may use each other, so they keep their order.
    exports = {name: common[name] for name in sorted(common) if name not in site.environment} | site.environment
    recorded = sorted({*exports, "MASTER_ADDR", "MASTER_PORT"})
    # The machine's options belong to its own launcher.
    system_options = system.launcher_options if launcher.name == system.launcher else []
    options = [word for option in [*system_options, *site.launcher_options] for word in shlex.split(option)]
    forwarded = launcher.forwarded(sorted({*recorded, *_CHANGED_BY_SETUP, "ATTEMPT"}))
    body = {
        **scheduler.variables,
        "nodes": scheduler.variables["nodes"] + (" | tail -n +2" if launcher.launch_node else ""),
        "title": title_of(job),
        "directives": scheduler.directives(job.resources),
        "modules": [as_words(names.split()) for names in site.modules],
        "setup": site.setup,
        "exports": as_shell(exports),
        "variables": "|".join(recorded),
        "grace": job.resources.warn_seconds // 2,
        "stop_signal": job.launch.stop_signal,
        "stopped": STOPPED,
        "files": sorted(job.launch.files),
        "inside": "".join(f"{word} " for word in [as_words(site.container)] if word),
        "command": as_words([*launcher.command(job.resources, options), *forwarded]),
    }
    program = site.programs.get(job.adapter)
    rank = {
        "clocks": system.clocks,
        "variables": launcher.variables,
        "sees_one_gpu": system.sees_one_gpu and job.resources.gpus_per_node > 0 and launcher.name == system.launcher,
        "program": None if program is None else in_quotes(program),
        "command": as_words([*site.container, *_placed(job.launch.command, program)]),
    }
    work = {
        "schema": SCHEMA,
        "adapter": job.adapter,
        "framework": job.framework,
        "machine": system.machine,
        "notes": list(job.launch.notes),
        **_plain(job.work),
    }
    return {
        "job.sh": rendered(environment, "job.sh.j2", body),
        "rank.sh": rendered(environment, "rank.sh.j2", rank),
        "work.json": json.dumps(work, indent=1) + "\n",
        **job.launch.files,
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def is_script(word: str) -> bool:
    """Return whether a word of a launch is a script in the folder of its framework."""
    return word.endswith(".py") and "/" not in word


def _placed(command: Sequence[str], program: str | None) -> list[str]:
    """Return the command with its script in the program's folder."""
    if program is None:
        return list(command)
    return [f"$program/{word}" if is_script(word) else word for word in command]


def _plain(work: ClusterWork | SmallWork) -> dict[str, Any]:
    """Return the work as JSON; the key tells which kind it is."""
    if isinstance(work, SmallWork):
        config = work.config.model_dump(mode="json")
        return {"small": {"name": work.name, "config": config, "warmup_batches": work.warmup_batches}}
    return {
        "work": {
            "name": work.name,
            "model": work.model.model_dump(mode="json"),
            "strategy": work.strategy.model_dump(mode="json"),
            "batch_size": work.batch_size,
            "steps": work.steps,
            "gpus": work.gpus,
            "gpus_per_node": work.gpus_per_node,
            "gradient_clipping": work.gradient_clipping,
            "data": work.data,
        }
    }


def load_manifest(folder: Path) -> Manifest:
    """Load the manifest of a folder that `write_jobs` wrote. Raises `RecordError` naming what is wrong."""
    return load_json(
        folder / MANIFEST, Manifest, otherwise="is this the folder that axonn jobs wrote? If it is, write the jobs anew"
    )


def changed_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Return the files that are gone, or are not what the manifest says."""
    return [
        name for name, expected in files.items() if not (folder / name).is_file() or hash_of(folder / name) != expected
    ]


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def hash_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
