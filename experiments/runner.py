"""Measured points: which there are, which are done, and running the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from axonn.config import ModelConfig, TrainConfig, UNetConfig
from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.phases import phases
from axonn.records import Asked, Failure, Record, read_records, write_records
from axonn.trace import Span, breakdown, overlap, read_spans, span_files
from experiments.definition import ROOT, Experiment, measured_configs, slug
from experiments.framework import Framework, load_framework, ran_by, version_of
from experiments.provenance import fingerprint, sources, this_machine
from experiments.supervisor import Outcome, supervise

MEASURED = ROOT / "results" / "measured"
RUNS = ROOT / "runs"
_SOURCES = (
    "axonn/*.py",
    "axonn/schedules/*.py",
    "axonn/transport/*.py",
    "axonn/inter_layer/*.py",
    "axonn/optim/*.py",
    "axonn/tensor/*.py",
    "axonn/models/*.py",
    "axonn/data/*.py",
    "baselines/*.py",
    "baselines/ranks/*.py",
    "experiments/worker.py",
    "experiments/trail.py",
    "experiments/loop.py",
    "experiments/*framework.py",
)
"""What a measured time depends on: a change here makes a point worth measuring anew."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of one framework."""

    experiment: str
    framework: str
    config: TrainConfig
    repeat: int
    warmup: int
    label: str
    """Of the point in records: what is measured, the same for every framework."""
    fingerprint: str

    @property
    def ranks(self) -> int:
        g = self.config.grid
        return g.data * g.inter * g.row * g.col

    @property
    def function(self) -> str:
        """What is computed, however it is: points with the same have the same losses."""
        c = self.config
        plain = [v.model_dump(mode="json") for v in (c.model, c.data, c.precision)]
        own = c.optimizer.model_dump(mode="json", exclude={"placement", "bsize", "k", "buckets_resident"})
        return fingerprint([*plain, own, c.batch_size, c.seed], [])

    @property
    def name(self) -> str:
        return slug(f"{self.experiment}-{self.label}-{self.framework}-{self.repeat}")

    @property
    def record_file(self) -> Path:
        return MEASURED / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    def finished_record(self) -> Record | None:
        """The point's record, if it has one that succeeded and that nothing has changed since."""
        if not self.record_file.exists():
            return None
        # One of another schema is an error: what somebody measured is not overwritten.
        record = next(iter(read_records(self.record_file)), None)
        done = record is not None and record.fingerprint == self.fingerprint and record.failure is None
        return record if done else None


def points_of(experiment: Experiment) -> list[Point]:
    """All points in the order in which they run: repeats outermost, frameworks alternating at each rank count.

    Raises `LaunchError` for a framework that nobody knows, and `ConfigError` where nothing is measured.
    """
    policy = experiment.policy
    if policy is None:
        raise ConfigError(f"experiments/{experiment.name}.yaml has nothing to measure; give it measured, or runs")
    machine = this_machine().model_dump(exclude={"commit"})
    code = fingerprint(machine, sources(*_SOURCES))
    work = measured_work(experiment)
    versions = {name: version_of(load_framework(name)) for name in {name for _, _, name in work}}
    return [
        Point(
            experiment=experiment.name,
            framework=name,
            config=config,
            repeat=repeat,
            warmup=policy.warmup_batches,
            label=label,
            fingerprint=fingerprint(
                [name, versions[name], config.model_dump(mode="json"), policy.warmup_batches, code], []
            ),
        )
        for repeat in range(policy.repeats)
        for label, config, name in work
    ]


def measured_work(experiment: Experiment) -> list[tuple[str, TrainConfig, str]]:
    """Label, configuration and framework of everything that is measured, once."""
    if experiment.measured is not None:
        panel = experiment.measured
        return [
            (f"{config.model.name}-{config.grid.inter}r", config, name)
            for config in measured_configs(panel)
            for name in panel.frameworks
        ]
    if experiment.runs is not None:
        configs = experiment.runs.configs(where=experiment.name)
        return [(label, config, experiment.runs.framework) for label, config in configs.items()]
    return []


def run_point(
    point: Point, *, command: str, on_batch: Callable[[int], None] = lambda done: None, timeout_s: float = 3600.0
) -> Record:
    """Measure one point and write its record, be it a failure, also of a framework that cannot do it here.

    Raises `LaunchError` when the ranks cannot start.
    """
    framework = load_framework(point.framework)
    reason = framework.unavailable(point.config)
    outcome = (
        supervise(point.framework, point.config, point.folder, on_batch=on_batch, timeout_s=timeout_s)
        if reason is None
        else Outcome(failure=Failure(cause="unavailable", detail=reason))
    )
    record = _record(point, framework, outcome, command)
    write_records(point.record_file, [record])
    return record


def measures(record: Record, config: TrainConfig) -> bool:
    """Whether a record is of a run of this very configuration."""
    return record.configuration == configuration_of(config)


def configuration_of(config: TrainConfig) -> str:
    """Hash of a configuration, for records."""
    return fingerprint(config.model_dump(mode="json"), [])


def _asked(config: TrainConfig) -> Asked:
    ranks = ProcessGrid(**config.grid.model_dump()).size
    return Asked.of(config.model, gpus=ranks, batch_size=config.batch_size, precision=config.precision.compute)


def compare_losses(records: list[tuple[Point, Record]], tolerance: float) -> list[Record]:
    """Losses before times: a record whose losses differ from the first of the same function is made a failure.

    Returns the failures, which are written in place of the records.
    """
    reference: dict[str, Record] = {}
    failures = []
    for point, record in records:
        if record.failure is not None:
            continue
        first = reference.setdefault(point.function, record)
        worst = max(
            (abs(a - b) / abs(a) for a, b in zip(first.losses, record.losses, strict=True)),
            default=math.inf,
        )
        if worst > tolerance:
            failure = Failure(
                cause="not-comparable",
                detail=f"losses differ from those of {first.ran.framework} ({first.point}) by {worst:.1e}, "
                f"more than {tolerance:.0e}",
            )
            changed = record.model_copy(update={"batch_time_s": None, "failure": failure})
            write_records(point.record_file, [changed])
            failures.append(changed)
    return failures


def spans_of(folder: Path, config: TrainConfig, *, first: int, last: int) -> list[Span]:
    """Spans of all ranks in the batches from `first` to before `last`; none where a rank took none."""
    grid = ProcessGrid(**config.grid.model_dump())
    files = [span_files(folder / f"spans-{rank}.parquet", first_step=first) for rank in range(grid.size)]
    if not all(files) or last <= first:
        return []
    return [s for own in files for file in own for s in read_spans(file) if first <= s.step < last]


def parts_of(folder: Path, config: TrainConfig, *, first: int, last: int) -> dict[str, float]:
    """Seconds of a batch by part, mean over ranks and over the batches from `first` to before `last`.

    Empty where a rank took no spans.
    """
    spans = spans_of(folder, config, first=first, last=last)
    return {name: value / (last - first) for name, value in breakdown(spans)._asdict().items()} if spans else {}


def _of_spans(spans: list[Span], batches: int) -> dict[str, dict[str, float]]:
    """What a record has of spans, for one batch."""
    if not spans:
        return {"parts_s": {}, "phases_s": {}, "overlap_s": {}}
    found = {"parts_s": breakdown(spans)._asdict(), "overlap_s": overlap(spans)._asdict()}
    of_one = {name: {key: value / batches for key, value in own.items()} for name, own in found.items()}
    return of_one | {"phases_s": phases(spans)._asdict()}


def tflops_formula(model: ModelConfig, *, recompute: bool) -> str:
    """The formula of `axonn.records.Asked.flops` in words."""
    name = "activation recompute" if recompute else "no recompute"
    if isinstance(model, UNetConfig):
        return f"{4 if recompute else 3} x forward of convolutions and matrix products ({name})"
    return f"{96 if recompute else 72}bslh^2(1+s/6h)+6bshV ({name})"


def _record(point: Point, framework: Framework, outcome: Outcome, command: str) -> Record:
    config = point.config
    times = outcome.batch_times_s[point.warmup :]
    mean = sum(times) / len(times) if times and outcome.failure is None else None
    asked = _asked(config)
    return Record(
        kind="measured",
        experiment=point.experiment,
        point=point.label,
        asked=asked,
        ran=ran_by(framework, config),
        machine=this_machine(),
        source=command,
        batch_time_s=mean,
        batch_times_s=outcome.batch_times_s,
        warmup_batches=point.warmup,
        losses=outcome.losses,
        **_of_spans(
            [] if mean is None else spans_of(point.folder, config, first=point.warmup, last=config.steps),
            config.steps - point.warmup,
        ),
        memory_bytes=outcome.memory_bytes,
        memory_parts=outcome.memory_parts,
        memory_of_all=outcome.memory_of_all,
        bytes_per_batch=outcome.bytes_per_batch,
        tflops_formula=None if mean is None else tflops_formula(config.model, recompute=False),
        tflops_per_gpu_without_recompute=None
        if mean is None
        else asked.flops(recompute=False) / mean / point.ranks / 1e12,
        fingerprint=point.fingerprint,
        configuration=configuration_of(config),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run_folder=str(point.folder.relative_to(ROOT)),
        failure=outcome.failure,
    )
