"""Published points of an experiment, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from axonn.config.loading import validate
from axonn.observability.records import Execution, Machine, Record, Workload, read_records
from axonn.perf.strategy import Strategy
from axonn.training.places import ROOT
from experiments.definition import OURS, Experiment
from experiments.validation.published_sets import FOLDER, Case, DataSet, Quantity, load_data_set, rules_for

PHASES: Mapping[Quantity, str] = {"pipeline_s": "inter_layer", "all_reduce_s": "all_reduce", "optimizer_s": "optimizer"}
"""Quantities of a data set that are phases of a batch (`axonn.observability.records.Record.phases_s`)."""


def published_records(experiment: Experiment) -> list[Record]:
    """Return the records of the record file, or of the data set, that the experiment names; empty if it names none.

    Points of a data set that only its ratios use have no record. Raises `RecordError` and `ConfigError` for mistakes
    in the files.
    """
    if experiment.published is not None:
        return read_records(ROOT / experiment.published)
    if experiment.data_set is None:
        return []
    data, cases = load_data_set(FOLDER / f"{experiment.data_set}.yaml")
    return [record for case in cases if (record := _record(experiment, data, case)) is not None]


@dataclass(frozen=True, kw_only=True)
class PublishedRatio:
    """A published speedup without times: `faster` is `value` times as fast as `slower`, on `gpus` GPUs."""

    label: str
    value: float
    faster: Case
    slower: Case
    source: str

    @property
    def gpus(self) -> int:
        """Number of GPUs of both points."""
        return self.faster.gpus


def published_ratios(experiment: Experiment) -> list[PublishedRatio]:
    """Return the ratios of the data set that the experiment names. Raises `ConfigError` for a wrong file."""
    if experiment.ratios is None:
        return []
    data, cases = load_data_set(FOLDER / f"{experiment.ratios}.yaml")
    by_label = {case.label: case for case in cases}
    return [
        PublishedRatio(
            label=ratio.label,
            value=ratio.published,
            faster=by_label[ratio.faster],
            slower=by_label[ratio.slower],
            source=data.source,
        )
        for ratio in data.ratios
    ]


def _record(experiment: Experiment, data: DataSet, case: Case) -> Record | None:
    phases = {phase: case.published[name] for name, phase in PHASES.items() if name in case.published}
    time = case.published.get("batch_time_s")
    if time is None and len(phases) == len(PHASES):
        time = sum(phases.values())
    if time is None and not phases:
        return None
    rules = rules_for(data, case)
    # Fields that a rule decides are not published.
    decided = {key for rule in rules for value in rule.among for key in value}
    strategy = validate({"microbatch_size": 1, **case.strategy}, Strategy, where=data.name)
    return Record(
        kind="published",
        experiment=experiment.name,
        point=case.label,
        asked=Workload.of(case.model, gpus=case.gpus, batch_size=case.batch_size, precision=strategy.compute),
        ran=Execution(
            framework=case.group or OURS,
            version="as published",
            grid=strategy.grid,
            microbatch_size=None if "microbatch_size" in decided else strategy.microbatch_size,
        ),
        machine=Machine(name=data.machine),
        source=data.source,
        batch_time_s=time,
        phases_s=phases,
        note=case.note or None,
    )
