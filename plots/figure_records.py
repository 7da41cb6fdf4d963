"""The records of a figure: points of every kind, each from where that kind lives, and what is missing from them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from axonn.config.train_config import TrainConfig
from axonn.errors import RecordError
from axonn.observability.records import Record, RecordKind, read_records
from axonn.training.framework import load_framework
from axonn.training.provenance import THIS_MACHINE
from axonn.training.run_record import configuration_of, measures
from experiments import predictor, runner
from experiments.definition import Experiment
from experiments.published_points import published_records
from plots.summary import Key, key

LARGEST = 4096
"""Ranks of the largest cluster on which a small weak scaling may have been measured."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """The records of an experiment by kind. `missing`: what should be there and is not, each with the way to get it."""

    experiment: Experiment
    published: list[Record]
    predicted: list[Record]
    measured: list[Record]
    missing: list[str]

    @property
    def records(self) -> list[Record]:
        """All records, of every kind."""
        return [*self.published, *self.predicted, *self.measured]

    @property
    def failures(self) -> list[Record]:
        """The records of runs that failed."""
        return [r for r in self.records if r.failure is not None]


def gather(experiment: Experiment) -> Content:
    """Return all records of an experiment.

    A file that cannot be read, or a record of a kind that does not belong where it lies, is named as missing and not
    drawn; so is every expected point without a record.
    """
    missing: list[str] = []
    predicted: list[Record] = []
    if experiment.predicts:
        predicted = _predicted(experiment, missing)
    published = published_records(experiment)
    records = [r for r in _readable(runner.MEASURED, "measured", missing) if r.experiment == experiment.name]
    work = {(label, load_framework(name).label): config for label, config, name in runner.measured_work(experiment)}
    at_scale = {r.point for r in published} | set(_names_at_scale(experiment))
    on_clusters = any(r.machine.name != THIS_MACHINE for r in records)
    cluster_work = _work_elsewhere(experiment) if on_clusters else {}
    measured = [r for r in records if _belongs(r, work, at_scale, cluster_work)]
    repeats = experiment.policy.repeats if experiment.policy is not None else 1
    for label, framework in work:
        local = [r for r in measured if key(r) == (label, framework) and r.machine.name == THIS_MACHINE]
        count = sum(_counts(r, experiment) for r in local)
        if count < repeats:
            status = "is not measured" if not count else f"is measured {count} times of {repeats}"
            missing.append(f"{label} {framework} {status}; run: axonn run experiments/{experiment.name}.yaml")
    return Content(experiment=experiment, published=published, predicted=predicted, measured=measured, missing=missing)


def _names_at_scale(experiment: Experiment) -> list[str]:
    return [p.name for p in predictor.points_to_predict(experiment)[1]] if experiment.predicts else []


def _work_elsewhere(experiment: Experiment) -> dict[Key, set[str]]:
    """Return hashes of the configurations that the experiment has for other machines, by point.

    A weak scaling has as many of a point as there are sizes of machines.
    """
    sizes = [1 << i for i in range(LARGEST.bit_length())] if experiment.measured is not None else [None]
    hash_of_work: dict[str, str] = {}
    hashes: dict[Key, set[str]] = {}
    for most in sizes:
        for label, config, name in runner.measured_work(experiment, most=most):
            # The frameworks of a point have one configuration.
            work = f"{most} {label}"
            hash_of_work[work] = hash_of_work.get(work) or configuration_of(config)
            hashes.setdefault((label, load_framework(name).label), set()).add(hash_of_work[work])
    return hashes


def _belongs(
    record: Record,
    work: Mapping[Key, TrainConfig],
    at_scale: Collection[str],
    cluster_work: Mapping[Key, Collection[str]],
) -> bool:
    """Return whether a measured record belongs to the experiment as it is now.

    Its configuration is one that the experiment has for this machine (a record left over from an earlier configuration
    is no repeat of it), or it comes from a cluster and is of a configuration for clusters, or of a point at the
    published scale.
    """
    if record.machine.name != THIS_MACHINE:
        return record.point in at_scale or record.configuration in cluster_work.get(key(record), ())
    config = work.get(key(record))
    return config is not None and measures(record, config)


def _counts(record: Record, experiment: Experiment) -> bool:
    """Return whether a run needs no repeat: it succeeded, or its framework, one of several, is not available here."""
    if record.failure is None:
        return True
    return record.failure.cause == "unavailable" and experiment.measured is not None


def _predicted(experiment: Experiment, missing: list[str]) -> list[Record]:
    """Return the predicted records; outdated ones, and points without one, are added to `missing`."""
    path = predictor.predicted_file(experiment)
    remedy = f"run: axonn predict experiments/{experiment.name}.yaml"
    try:
        records = _of_kind(read_records(path), "predicted", path, missing) if path.exists() else []
    except RecordError as error:
        missing.append(str(error))
        records = []
    if records and records[0].fingerprint != predictor.fingerprint_of(experiment):
        missing.append(f"the predictions are of other inputs than there are now; {remedy}")
    recorded = {(r.point, r.ran.framework) for r in records}
    for point in predictor.points_to_predict(experiment)[1]:
        if (point.name, point.framework) not in recorded:
            missing.append(f"{point.name} {point.framework} is not predicted; {remedy}")
    return records


def _readable(folder: Path, kind: RecordKind, missing: list[str]) -> list[Record]:
    """Return the records of a folder; files that cannot be read are added to `missing`."""
    records: list[Record] = []
    for path in sorted(folder.glob("*.json")):
        try:
            records += _of_kind(read_records(path), kind, path, missing)
        except RecordError as error:
            missing.append(str(error))
    return records


def _of_kind(records: Iterable[Record], kind: RecordKind, path: Path, missing: list[str]) -> list[Record]:
    """Return the records of this kind; those of another are added to `missing`."""
    kept = []
    for record in records:
        if record.kind == kind:
            kept.append(record)
        else:
            missing.append(f"{path}: {record.point} is {record.kind} and lies among the {kind} ones; remove it")
    return kept
