"""Records of the jobs that ended: times where a run is complete, otherwise a failure with its cause."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from axonn.config.model_config import validate_model
from axonn.config.train_config import TrainConfig, validate
from axonn.durable_files import read_bytes, read_json
from axonn.errors import AxonnError, ConfigError, RecordError
from axonn.observability.records import Failure, Record, read_records, write_records
from axonn.perf.strategy import Strategy
from axonn.training.framework import ClusterWork, PrintedRun, load_adapter, load_framework, ran_by
from axonn.training.places import ROOT, in_project
from axonn.training.run_folder import SPEC
from axonn.training.run_outcome import Outcome, outcome_of, steady
from axonn.training.run_record import function_of, left_by_ranks, readable_spans, run_record, with_losses_compared
from experiments.cluster_work import SmallWork, record_of
from experiments.definition import find_machine, load_experiment, slug
from jobscripts.attempts import ENDED, attempts, in_order
from jobscripts.generate import SCHEMA, JobEntry, Manifest, changed_files, hash_of, load_manifest
from jobscripts.job_failure import failure_of_job, not_yet
from jobscripts.run_environment import RunEnvironment, changes, environment_of
from jobscripts.submission import Standing, standings

RECORD = "record.json"
"""File in the run folder: the record of the run, the same as among the results."""
SUMS = "sha256.txt"
"""File in the folder of an attempt: the sha256sum of files of the run folder when it ended."""
_TOLERANCE = 1e-4
"""Tolerance of losses, where the experiment is not there to set it."""
_LARGEST_LOG = 2**30
"""Most bytes of a run's output."""
Work = ClusterWork | SmallWork


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The record of one job, or why it has none.

    `broken`: its files cannot be read; `hidden`: its failure is not among the results, which keep the time of an
    earlier run.
    """

    entry: JobEntry
    record: Record | None
    why: str = ""
    broken: bool = False
    hidden: bool = False


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Files and work of a job that ended. `starts`: folders of its attempts, the first one first."""

    manifest: Manifest
    standing: Standing
    folder: Path
    work: Work
    starts: list[Path]
    command: str

    @property
    def path(self) -> Path:
        return self.folder / "run"

    @property
    def spec(self) -> dict[str, Any] | None:
        """Specification with which our own ranks were started; None for a framework with ranks of its own."""
        path = self.folder / SPEC
        return read_json(path) if f"{self.folder.name}/{SPEC}" in self.standing.entry.files else None

    @property
    def on_cpu(self) -> bool:
        """True if its ranks compute on processors."""
        return (spec := self.spec) is not None and spec["device"] == "cpu"

    def environment(self) -> RunEnvironment:
        return environment_of(self.starts, machine=self.manifest.machine, on_cpu=self.on_cpu)

    def noted(self, record: Record) -> Record:
        """Return the record with what changed between the starts."""
        adapter = self.standing.entry.adapter.partition("/")[0]
        differences = changes(self.starts, adapter=adapter, machine=self.manifest.machine, on_cpu=self.on_cpu)
        return record.model_copy(update={"note": "; ".join(filter(None, (record.note, differences))) or None})


def collect(folder: Path, *, results: Path, command: str) -> list[Collected]:
    """Write a record of each job that ended into `results` and into its run folder; a job that waits or runs has none
    yet.

    A job whose files were changed, or cannot be read, is marked `broken` and does not hold up the others. Raises
    `RecordError` for a folder that axonn jobs did not write.
    """
    manifest = load_manifest(folder)
    collected: list[tuple[Collected, Work | None]] = []
    for standing in standings(folder):
        entry = standing.entry
        try:
            collected.append(_collected(manifest, standing, folder, command))
        except AxonnError as error:
            reason = "; ".join(str(error).splitlines())
            collected.append((Collected(entry=entry, record=None, why=reason, broken=True), None))
        except (OSError, ValueError, TypeError, KeyError, ArithmeticError, AttributeError) as error:
            reason = f"{folder / entry.name}: what it left cannot be read: {type(error).__name__}: {error}"
            collected.append((Collected(entry=entry, record=None, why=reason, broken=True), None))
    compared = _losses_compared(manifest, collected)
    for i, one in enumerate(compared):
        if one.record is not None:
            name = f"{manifest.experiment}-{slug(manifest.machine)}-{one.entry.name}-{_mark(manifest, one.entry)}.json"
            if one.record.failure is not None and _has_time(results / name):
                compared[i] = replace(one, hidden=True)
            else:
                write_records(results / name, [one.record])
            if (run := folder / one.entry.name / "run").is_dir():
                write_records(run / RECORD, [one.record])
    return compared


def _has_time(path: Path) -> bool:
    """Return whether a run was complete before, in a copy of the folder or before it was submitted anew: no failure
    hides it."""
    try:
        return all(record.failure is None for record in read_records(path))
    except RecordError:
        return False


def _mark(manifest: Manifest, entry: JobEntry) -> str:
    """Return a hash of the files and the command that wrote them: other folders have other records, copies of a folder
    the same."""
    written = json.dumps([manifest.command, entry.files], sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()[:8]


def _collected(manifest: Manifest, standing: Standing, folder: Path, command: str) -> tuple[Collected, Work | None]:
    entry = standing.entry
    job = folder / entry.name
    _check_files(folder, entry)
    if (why := not_yet(standing)) is not None:
        return Collected(entry=entry, record=None, why=why), None
    work = work_of(job / "work.json", manifest, entry)
    run = _Run(
        manifest=manifest, standing=standing, folder=job, work=work, starts=in_order(attempts(job)), command=command
    )
    record = _small_record(run, work) if isinstance(work, SmallWork) else _published_record(run, work)
    return Collected(entry=entry, record=run.noted(record)), work


def _check_files(folder: Path, entry: JobEntry) -> None:
    """Raise `RecordError` for files that differ from those that axonn jobs wrote, or that the job left."""
    if changed := changed_files(folder, entry.files):
        path = folder / changed[0]
        how = "not what axonn jobs wrote (its sha256 differs)" if path.exists() else "gone"
        raise RecordError(f"{path} is {how}: what ran is not known; put it back, or write the jobs anew and run them")
    run = folder / entry.name / "run"
    for path, expected in _copies(run, entry):
        if hash_of(path) != expected:
            raise RecordError(
                f"{path} is not what axonn jobs wrote (its sha256 differs): what ran is not known; put it back, or "
                "submit the job again"
            )
    starts = in_order(attempts(run.parent))
    for start in starts:
        for path, expected in _sums(start, newest=start == starts[-1]):
            if not path.is_file() or hash_of(path) != expected:
                raise RecordError(
                    f"{path} is not what the job left (its sha256 differs): what was measured is not known; put it "
                    "back, or submit the job again"
                )


def _copies(run: Path, entry: JobEntry) -> Iterator[tuple[Path, str]]:
    """Yield copies in the run folder of what was written for the job, with the sha256 that they should have."""
    for name, expected in entry.files.items():
        file = name.partition("/")[2]
        for path in (run / file, *run.glob(f"attempt-*/{file}")):
            if path.is_file():
                yield path, expected


def _sums(start: Path, *, newest: bool) -> Iterator[tuple[Path, str]]:
    """Yield files of the run folder with the sha256 that they had when an attempt ended; a later attempt changes all
    but those of the attempt's own folder."""
    path = start / SUMS
    if (start / ENDED).exists() and not path.is_file():
        raise RecordError(
            f"{path} is gone: whether what the job left was changed is not known; put it back, or submit the job again"
        )
    lines = read_bytes(path, most=_LARGEST_LOG).decode("utf-8", "replace").splitlines() if path.is_file() else []
    for line in lines:
        expected, _, name = line.partition(" ")
        name = name.strip().removeprefix("*").removeprefix("./")
        if name.startswith("/") or ".." in name.split("/"):
            raise RecordError(f"{path}: {name} is no file of the run folder; submit the job again")
        if len(expected) == 64 and name and (newest or name.startswith(f"{start.name}/")):
            yield start.parent / name, expected


def work_of(path: Path, manifest: Manifest, entry: JobEntry) -> Work:
    """Return the work that a job was written for. Raises `RecordError` where its file contradicts the manifest."""
    try:
        content = read_json(path)
        noted = {name: content[name] for name in ("schema", "adapter", "framework", "machine")}
        plain = content["small"] if "small" in content else content["work"]
        asked = {"schema": SCHEMA, "adapter": entry.adapter, "framework": entry.framework, "machine": manifest.machine}
        for name, value in asked.items():
            if noted[name] != value:
                raise RecordError(
                    f"{path}: says {name} '{noted[name]}', and the manifest '{value}'; write the jobs anew"
                )
        if "small" in content:
            config = validate(plain["config"], TrainConfig, where=f"{path}: config")
            return SmallWork(**{**plain, "framework": entry.adapter, "config": config})
        model = validate_model(plain["model"], where=f"{path}: model")
        strategy = validate(plain["strategy"], Strategy, where=f"{path}: strategy")
        return ClusterWork(**{**plain, "model": model, "strategy": strategy})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{path}: is no work of a job ({type(error).__name__}: {error}); write the jobs anew with axonn jobs"
        ) from error


def _small_record(run: _Run, work: SmallWork) -> Record:
    """Return the record that axonn run makes of such a run."""
    outcome = _outcome(run, work.config)
    environment = run.environment()
    record = run_record(
        work.config,
        outcome,
        folder=run.path,
        warmup=work.warmup_batches,
        point=work.name,
        ran=ran_by(load_framework(work.framework), work.config).model_copy(
            update={"version": environment.version(work.framework.partition("/")[0])}
        ),
        **_surroundings(run, environment),
    )
    return _with_peak(record, run.manifest.machine, environment)


def _published_record(run: _Run, work: ClusterWork) -> Record:
    """Return the record of a point at the published scale: from its output, and more where the ranks were our own."""
    spec, environment = run.spec, run.environment()
    outcome = config = None
    if spec is not None:
        config = validate(spec["config"], TrainConfig, where=str(run.folder / SPEC))
        outcome = _outcome(run, config)
        printed = PrintedRun(
            seconds=outcome.batch_times_s,
            losses=outcome.losses,
            memory_bytes=outcome.memory_bytes,
            failure=outcome.failure,
        )
        new_starts = outcome.new_starts
    else:
        printed, new_starts = _printed(run)
        printed = replace(printed, failure=_failure(run, printed.failure, printed.seconds))
    fields = _surroundings(run, environment)
    record = record_of(
        work,
        printed,
        framework=run.standing.entry.framework,
        version=environment.version(run.standing.entry.adapter),
        machine=fields.pop("machine"),
        source=fields.pop("source"),
        experiment=fields.pop("experiment"),
        new_starts=new_starts,
    )
    if config is not None and outcome is not None:
        timed = record.failure is None
        batches = steady(len(outcome.batch_times_s), record.warmup_batches or 0, new_starts) if timed else []
        fields |= left_by_ranks(config, outcome, folder=run.path, batches=batches)
    return _with_peak(record.model_copy(update=fields), run.manifest.machine, environment)


def _outcome(run: _Run, config: TrainConfig) -> Outcome:
    """Return the outcome of our own ranks; the states are those of the newest start."""
    adapter = load_adapter(run.standing.entry.adapter.partition("/")[0])
    output = _lines(run.starts[-1] / "output.txt") if run.starts else []
    states = [line for path in sorted(run.path.glob("rank-*.json")) for line in _lines(path)]
    printed = adapter.read([*states, *output])
    outcome = outcome_of(run.path, config.grid.size)
    failure = _failure(run, printed.failure, outcome.batch_times_s)
    if failure is None and (unreadable := readable_spans(run.path, config)) is not None:
        raise RecordError(
            f"{unreadable}; remove the file to have the record without its parts, or submit the job again"
        )
    return replace(outcome, failure=failure)


def _printed(run: _Run) -> tuple[PrintedRun, list[int]]:
    """Return the iterations of all attempts, a later one's in place of an earlier one's, and those with which an
    attempt resumed.

    The newest attempt alone says how the run ended.
    """
    adapter = load_adapter(run.standing.entry.adapter)
    lines: list[str] = []
    last, joined, resumed_at = PrintedRun(), PrintedRun(), []
    for start in run.starts:
        output = _lines(start / "output.txt")
        lines += output
        last, joined = adapter.read(output), adapter.read(lines)
        if last.seconds and len(joined.seconds) > len(last.seconds):
            resumed_at.append(len(joined.seconds) - len(last.seconds))
    reported = [start for start in joined.starts if start > 0]
    return replace(joined, failure=last.failure, finished=last.finished), reported or resumed_at


def _failure(run: _Run, printed: Failure | None, seconds: Sequence[float]) -> Failure | None:
    """Return why there is no time; None for a run with all its batches, whatever happened when it ended."""
    if len(seconds) >= run.work.steps and (printed is None or printed.cause != "nan"):
        return None
    return failure_of_job(run.standing, printed, done=len(seconds), steps=run.work.steps, job=run.folder)


def _lines(path: Path) -> list[str]:
    return read_bytes(path, most=_LARGEST_LOG).decode("utf-8", "replace").splitlines() if path.is_file() else []


def _surroundings(run: _Run, environment: RunEnvironment) -> dict[str, Any]:
    """Return the fields of a record that describe its surroundings."""
    return {
        "experiment": run.manifest.experiment,
        "machine": environment.machine,
        "source": run.command,
        "created": environment.created,
        "run_folder": in_project(run.path.resolve()),
    }


def _with_peak(record: Record, machine: str, environment: RunEnvironment) -> Record:
    """Return the record with the share of the peak, where the ranks computed on GPUs whose peak is known."""
    rate = record.tflops_per_gpu or record.tflops_per_gpu_without_recompute
    if rate is None or environment.machine.device == "cpu":
        return record
    try:
        peak = find_machine(machine).gpu.peak.si
    except ConfigError:
        return record
    return record.model_copy(update={"pct_peak": 100 * rate * 1e12 / peak})


def _losses_compared(manifest: Manifest, jobs: list[tuple[Collected, Work | None]]) -> list[Collected]:
    """Return the jobs with the losses of small work compared, as axonn run compares them."""
    small = [
        (i, function_of(work.config), one.record)
        for i, (one, work) in enumerate(jobs)
        if isinstance(work, SmallWork) and one.record is not None
    ]
    records = with_losses_compared([(function, record) for _, function, record in small], _tolerance(manifest))
    collected = [one for one, _ in jobs]
    for (i, _, _), record in zip(small, records, strict=True):
        collected[i] = replace(collected[i], record=record)
    return collected


def _tolerance(manifest: Manifest) -> float:
    try:
        policy = load_experiment(ROOT / "experiments" / f"{manifest.experiment}.yaml").policy
    except ConfigError:
        return _TOLERANCE
    return _TOLERANCE if policy is None else policy.loss_tolerance
