"""Measured points of an experiment: their list, their finished records, and runs of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from axonn.config.train_config import TrainConfig
from axonn.device.devices import DeviceType
from axonn.durable_files import locked_folder
from axonn.errors import ConfigError
from axonn.observability.records import Failure, Record, read_records, write_records
from axonn.training.capacity import lacking_here
from axonn.training.framework import Framework, load_adapter, load_framework, ran_by, version_of
from axonn.training.places import PROJECT
from axonn.training.provenance import fingerprint, source_files, this_machine
from axonn.training.run_outcome import Outcome
from axonn.training.run_record import function_of, run_record, with_losses_compared
from axonn.training.supervision.supervisor import supervise
from experiments.definition import Experiment, measured_configs, slug

MEASURED = PROJECT / "results" / "measured"
RUNS = PROJECT / "runs"


@dataclass(frozen=True, kw_only=True)
class MeasuredPoint:
    """One run of one framework."""

    experiment: str
    framework: str
    config: TrainConfig
    repeat: int
    warmup: int
    label: str
    """Name of the point in records: the measured work, the same for every framework."""
    device: DeviceType = "cpu"
    fingerprint: str

    @property
    def ranks(self) -> int:
        """Number of ranks of the grid."""
        return self.config.grid.size

    @property
    def function(self) -> str:
        """Hash of the function that is computed, in whatever way: points with the same hash have the same losses."""
        return function_of(self.config)

    @property
    def name(self) -> str:
        """Name of the run: of its record file and its run folder."""
        return slug(f"{self.experiment}-{self.label}-{self.framework}-{self.repeat}")

    @property
    def record_file(self) -> Path:
        """File of the point's record."""
        return MEASURED / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        """Run folder of the point."""
        return RUNS / self.name

    def finished_record(self) -> Record | None:
        """Return the point's record if it succeeded and nothing has changed since, otherwise None."""
        if not self.record_file.exists():
            return None
        # Another schema is an error: a user's measurement is not overwritten.
        record = next(iter(read_records(self.record_file)), None)
        done = record is not None and record.fingerprint == self.fingerprint and record.failure is None
        return record if done else None


def points_of(experiment: Experiment, device: DeviceType = "cpu") -> list[MeasuredPoint]:
    """Return all points in the order in which they run: repeats outermost, frameworks alternating at each rank count.

    `device`: device of their ranks. Raises `LaunchError` for an unknown framework, and `ConfigError` where nothing is
    measured.
    """
    policy = experiment.policy
    if policy is None:
        raise ConfigError(f"experiments/{experiment.name}.yaml has nothing to measure; give it measured, or runs")
    machine = this_machine(device=device).model_dump(exclude={"commit", "clocks"})
    work = measured_work(experiment)
    frameworks = {name: load_framework(name) for name in {name for _, _, name in work}}
    versions = {name: version_of(framework) for name, framework in frameworks.items()}
    code = {name: fingerprint(machine, source_files(*one.source_modules())) for name, one in frameworks.items()}
    return [
        MeasuredPoint(
            experiment=experiment.name,
            framework=name,
            config=config,
            repeat=repeat,
            warmup=policy.warmup_batches,
            label=label,
            device=device,
            fingerprint=fingerprint(
                [name, versions[name], config.model_dump(mode="json"), policy.warmup_batches, code[name]], []
            ),
        )
        for repeat in range(policy.repeats)
        for label, config, name in work
    ]


def measured_work(experiment: Experiment, *, most: int | None = None) -> list[tuple[str, TrainConfig, str]]:
    """Return label, configuration and framework of each measured run, once; a weak scaling up to `most` ranks."""
    if experiment.measured is not None:
        panel = experiment.measured
        return [
            (f"{config.model.name}-{config.grid.inter}r", config, name)
            for config in measured_configs(panel, most=most)
            for name in panel.frameworks
        ]
    if experiment.runs is not None:
        configs = experiment.runs.configs(where=experiment.name)
        return [(label, config, experiment.runs.framework) for label, config in configs.items()]
    return []


def run_point(
    point: MeasuredPoint,
    *,
    command: str,
    on_batch: Callable[[int], None] = lambda done: None,
    on_warning: Callable[[str], None] = lambda text: None,
    timeout_s: float = 3600.0,
) -> Record:
    """Measure one point and write its record, also a failure, such as of a framework or machine that cannot run it.

    Raises `LaunchError` when the ranks cannot start, or another run of the point is under way.
    """
    framework = load_framework(point.framework)
    reason = (
        framework.unavailable(point.config) or _not_on(point) or "; ".join(lacking_here(point.config, point.device))
    )
    with locked_folder(point.folder):
        outcome = (
            supervise(
                point.framework,
                point.config,
                point.folder,
                on_batch=on_batch,
                on_warning=on_warning,
                timeout_s=timeout_s,
                device=point.device,
            )
            if not reason
            else Outcome(failure=Failure(cause="unavailable", detail=reason))
        )
        record = _record(point, framework, outcome, command)
        write_records(point.record_file, [record])
    return record


def _not_on(point: MeasuredPoint) -> str | None:
    """Return why a framework cannot compute on the device of a point, or None."""
    if point.device == "cpu":
        return None
    devices = load_adapter(point.framework.partition("/")[0]).capabilities().devices
    if point.device in devices:
        return None
    return f"it runs on {' and '.join(devices)} here; leave out --device {point.device} to measure it there"


def compare_losses(records: list[tuple[MeasuredPoint, Record]], tolerance: float) -> list[Record]:
    """Compare losses, which come before times: a record whose losses differ from the first one of the same function
    becomes a failure, and is written as one. Return those failures."""
    compared = with_losses_compared([(point.function, record) for point, record in records], tolerance)
    failures = []
    for (point, record), changed in zip(records, compared, strict=True):
        if changed is not record:
            write_records(point.record_file, [changed])
            failures.append(changed)
    return failures


def _record(point: MeasuredPoint, framework: Framework, outcome: Outcome, command: str) -> Record:
    return run_record(
        point.config,
        outcome,
        folder=point.folder,
        warmup=point.warmup,
        experiment=point.experiment,
        point=point.label,
        ran=ran_by(framework, point.config),
        machine=this_machine(device=point.device),
        source=command,
        fingerprint=point.fingerprint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run_folder=str(point.folder.relative_to(PROJECT)),
    )
