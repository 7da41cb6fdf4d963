"""Launches of the published configurations, beside those under goldens/launch."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axonn.distributed.launch import mpiexec_command, rank_environment
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.training.framework import ClusterWork, Launch, load_adapter
from experiments.cluster_work import cluster_work
from experiments.definition import HERE, ROOT, PredictedPanel, PredictedPoint, load_experiment
from experiments.validation.published_sets import case_of, find_data_sets, load_data_set, rules_for

GOLDENS = Path(__file__).parents[1] / "goldens" / "launch"


def point_work(panel: PredictedPanel, point: PredictedPoint, **options: Any) -> ClusterWork:
    """Of a point of an experiment file."""
    return cluster_work(case_of(panel, point), machine=panel.machine, name=point.name, **options)


def published(framework: str) -> Iterator[ClusterWork]:
    """The work of a framework's points: those of fig6.yaml, and the GPTs of all published data sets."""
    panel = load_experiment(HERE / "fig6.yaml").predicted
    assert panel is not None
    yield from (point_work(panel, point) for point in panel.points if point.framework == framework)
    for path in find_data_sets():
        data, cases = load_data_set(path)
        # A set of an experiment has its points; where a rule fixes what is open, the configuration is not published.
        for case in cases if data.points else ():
            own = (case.group or "AxoNN") == framework and isinstance(case.model, GPTConfig)
            if own and not list(rules_for(data, case)):
                yield cluster_work(case, machine=data.machine, name=f"{data.name}: {case.label}")


def as_text(launch: Launch) -> str:
    """All that it says, one option and its value a line; the place of this checkout is left out."""
    lines: list[str] = []
    for word in launch.command:
        if lines and not word.startswith("--"):
            lines[-1] += f" {shlex.quote(word)}"
        else:
            lines.append(shlex.quote(word))
    text = [f"{name}={shlex.quote(value)}" for name, value in launch.environment.items()] + lines
    for name, content in launch.files.items():
        is_json = name.endswith(".json")
        text += ["", f"== {name}", json.dumps(json.loads(content), indent=1) if is_json else content, ""]
    text += [f"# {note}" for note in launch.notes]
    return "\n".join(text).replace(str(ROOT), "ROOT") + "\n"


def golden(adapter: str, work: ClusterWork) -> Path:
    return GOLDENS / adapter / f"{re.sub(r'[^a-z0-9.]+', '-', work.name.lower())}.txt"


def write_goldens(adapter: str, framework: str) -> None:
    """Write the adapter's launches of the framework's points anew."""
    for work in published(framework):
        path = golden(adapter, work)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_text(load_adapter(adapter).launch(work)), encoding="utf-8")


def check_goldens(adapter: str, framework: str) -> int:
    """Compare the adapter's launches with the goldens; how many there are."""
    works = list(published(framework))
    for work in works:
        assert as_text(load_adapter(adapter).launch(work)) == golden(adapter, work).read_text(encoding="utf-8"), work
    assert set((GOLDENS / adapter).iterdir()) == {golden(adapter, work) for work in works}
    return len(works)


def run_launch(
    launch: Launch, ranks: int, folder: Path, *, python: str, mpiexec: str | None = None, path: str = ""
) -> list[str]:
    """Start in `folder` what a launch says, on this machine's processors; lines of what it left and printed.

    `path`: where its Python finds this suite.
    """
    for name, text in launch.files.items():
        (folder / name).write_text(text.replace('"device": "cuda"', '"device": "cpu"'), encoding="utf-8")
    assert launch.command[0] == "python"
    command = mpiexec_command(ranks, [python, *launch.command[1:]], mpiexec=mpiexec)
    with open(folder / "log.txt", "w") as log:
        subprocess.run(
            command,
            cwd=folder,
            env=rank_environment(os.environ) | {"PYTHONPATH": path} | dict(launch.environment),
            stdout=log,
            stderr=log,
            timeout=120,
            check=False,
        )
    return files_of(folder)


def files_of(folder: Path) -> list[str]:
    """Lines of what is read of a run folder, the last file first."""
    paths = [folder / "batches.jsonl", *sorted(folder.glob("rank-*.json")), folder / "log.txt"]
    return [line for path in reversed(paths) if path.exists() for line in path.read_text().splitlines()]
