"""Published measurements that validate the performance model: one file of `experiments/validation` per set.

A set names its machine and has, point by point, the run and its measurement. A setting that the publication leaves
open is listed under `open`, with the rule by which it was fixed before anything was predicted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from axonn.config.loading import Inside, Line, Name
from axonn.config.model_config import ModelConfig, validate_model
from axonn.config.train_config import StrictModel, load_yaml, validate
from axonn.errors import AxonnError, ConfigError, RecordError
from axonn.observability.records import Record, read_records
from axonn.perf.strategy import Strategy
from axonn.training.places import ROOT
from experiments.definition import (
    HERE,
    Experiment,
    PredictedPanel,
    PredictedPoint,
    load_experiment,
    load_model,
    merge,
    strategy_fields,
)

FOLDER = HERE / "validation"

Quantity = Literal[
    "batch_time_s",
    "pipeline_s",
    "step_s",
    "all_reduce_s",
    "optimizer_s",
    "tflops_per_gpu",
    "model_tflops_per_gpu",
    "samples_per_s",
]
"""Published quantities. pipeline_s: from the first forward to the last backward; step_s: the rest of the batch;
all_reduce_s, optimizer_s: the two parts of step_s on the stage that ends last. Except for waiting, pipeline_s and these
two add up to batch_time_s, as published bars do. tflops_per_gpu: by 96bslh^2(1+s/6h+V/16lh), recomputation counted
(`axonn.observability.records.gpt_flops`). model_tflops_per_gpu: without recomputation, as a model FLOPs utilisation
counts. samples_per_s: sequences or images of the whole job."""


class Open(StrictModel):
    """A setting that is not published, and the rule that fixes it.

    With `take` the rule is executed: of the strategies `among`, each merged into the point's own, it takes the first
    that fits into the device's memory, or of all that fit the one with the shortest predicted batch (which tuning would
    have found). Without `take` the set has the value itself.
    """

    setting: str
    rule: str
    points: list[str] | None = None
    """Labels of the points, by default all."""
    take: Literal["first-that-fits", "fastest-that-fits"] | None = None
    among: list[dict[str, Any]] = []

    def model_post_init(self, context: object) -> None:
        if (self.take is None) != (not self.among):
            raise ValueError("take and among belong together")

    @cached_property
    def labels(self) -> frozenset[str] | None:
        """Labels of the points that the rule applies to; None for all."""
        return None if self.points is None else frozenset(self.points)


class MeasuredQuantities(StrictModel):
    """Several published numbers of one point, by quantity."""

    batch_time_s: float | None = Field(default=None, gt=0)
    pipeline_s: float | None = Field(default=None, gt=0)
    step_s: float | None = Field(default=None, gt=0)
    all_reduce_s: float | None = Field(default=None, gt=0)
    optimizer_s: float | None = Field(default=None, gt=0)
    tflops_per_gpu: float | None = Field(default=None, gt=0)
    model_tflops_per_gpu: float | None = Field(default=None, gt=0)
    samples_per_s: float | None = Field(default=None, gt=0)


class SetPoint(StrictModel):
    """A published run and its measurement; absent fields are the set's defaults. `strategy` overrides `groups`, which
    overrides `defaults`."""

    label: Line
    group: str = ""
    model: Any = None
    """A name of experiments/models, or the keys of a model."""
    gpus: int = Field(ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    strategy: dict[str, Any] = {}
    published: float | None = Field(default=None, gt=0)
    """Published number in the set's quantity; None for a point that only ratios use, or one with `parts`."""
    parts: MeasuredQuantities = MeasuredQuantities()
    note: str = ""


class Defaults(StrictModel):
    """Fields that points share."""

    model: Any = None
    batch_size: int | None = Field(default=None, ge=1)
    strategy: dict[str, Any] = {}


class Ratio(StrictModel):
    """A published speedup: the batch time of the point `slower` over that of `faster`."""

    label: Line
    slower: str
    faster: str
    published: float = Field(gt=0)


class Targets(StrictModel):
    """Bounds of the errors in percent: of their mean, the largest, those of ratios, and the mean of a group."""

    mean_pct: float | None = None
    max_pct: float | None = None
    ratio_pct: float | None = None
    groups: dict[str, float] = {}


class Variant(StrictModel):
    """An alternative to an assumption, which shows how much depends on it. Rules are executed anew."""

    label: Line
    machine: str | None = None
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory of a device, GB."""
    model: Any = None
    """A name of experiments/models, the keys of a model, or without `name` those that differ from the point's own."""
    batch_scale: float = Field(default=1.0, gt=0)
    strategy: dict[str, Any] = {}
    points: list[str] | None = None
    """Labels of the points, by default all."""
    strategies: dict[str, dict[str, Any]] = {}
    """Strategies by label, which override `strategy`."""

    @cached_property
    def labels(self) -> frozenset[str] | None:
        """Labels of the points that it changes; None for all."""
        return None if self.points is None else frozenset(self.points)


class DataSet(StrictModel):
    """One published table or figure.

    With `experiment`, a file of experiments/, the strategies of its frameworks are those of groups with the same names,
    overridden by `groups`; without `points`, its points and its published batch times are the set's.
    """

    name: Name
    title: str
    source: str
    status: Literal["text", "figure", "repo", "derived"]
    """Origin of the numbers: stated in the source, read off its drawing, found in its code, or computed from these."""
    machine: Line
    quantity: Quantity = "batch_time_s"
    experiment: Inside | None = None
    defaults: Defaults = Defaults()
    groups: dict[str, dict[str, Any]] = {}
    """Strategies of groups of points."""
    points: list[SetPoint] = []
    ratios: list[Ratio] = []
    open: list[Open] = []
    targets: Targets = Targets()
    variants: list[Variant] = []


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point, complete. `published`: its numbers by quantity."""

    label: Line
    group: str
    model: ModelConfig
    gpus: int
    batch_size: int
    strategy: dict[str, Any]
    published: Mapping[Quantity, float]
    note: str = ""

    def candidates(self, rule: Open, where: str) -> Iterator[tuple[dict[str, Any], Case]]:
        """Yield each value of an open setting, and the point with that value."""
        for value in rule.among:
            case = replace(self, strategy=merge(self.strategy, value))
            case.checked(where)
            yield value, case

    def checked(self, where: str) -> Strategy:
        """Return the strategy. Raises `ConfigError` naming the point, the key and the nearest valid key."""
        return validate(self.strategy, Strategy, where=f"{where}: point '{self.label}'")

    def divides(self, where: str, variant: Variant | None = None) -> bool:
        """Return whether the strategy divides the batch, under the variant if there is one."""
        case = self if variant is None else self.under(variant, where)
        strategy = case.checked(where)
        return case.batch_size % (strategy.grid.data * strategy.microbatch_size) == 0

    def under(self, variant: Variant, where: str) -> Case:
        """Return the point as the variant changes it."""
        if variant.labels is not None and self.label not in variant.labels:
            return self
        batch = self.batch_size * variant.batch_scale
        if batch != int(batch):
            raise ConfigError(f"{where}: variant '{variant.label}': {batch} is no batch size; change batch_scale")
        return replace(
            self,
            model=self._model_under(variant, where),
            batch_size=int(batch),
            strategy=merge(merge(self.strategy, variant.strategy), variant.strategies.get(self.label, {})),
        )

    def _model_under(self, variant: Variant, where: str) -> ModelConfig:
        if variant.model is None:
            return self.model
        if isinstance(variant.model, dict) and "name" not in variant.model:
            return model_of(self.model.model_dump(mode="json") | variant.model, where=where)
        return model_of(variant.model, where=where)


def model_of(model: object, *, where: str) -> ModelConfig:
    """Return a model by name or by its keys. Raises `ConfigError` naming `where`, the key and the nearest valid key."""
    if isinstance(model, str):
        return load_model(model)
    return validate_model(model, where=f"{where}: model")


def load_data_set(path: Path | str) -> tuple[DataSet, list[Case]]:
    """Read and check a data set, every strategy included. Raises `ConfigError` naming the file and the key."""
    data = load_yaml(path, DataSet)
    where = str(path)
    try:
        cases = _all_cases(data, where)
    except AxonnError as error:
        # The message may name the file of an experiment or a model instead.
        raise ConfigError(str(error) if where in str(error) else f"{where}: {error}") from error
    known = {case.label: case for case in cases}
    if len(known) < len(cases):
        raise ConfigError(f"{where}: two points have the same label")
    for key, names in _mentions(data):
        for name in names:
            if name not in known:
                near = get_close_matches(name, known, n=1, cutoff=0.4) or list(known)
                raise ConfigError(f"{where}: {key} names the point '{name}'; did you mean '{near[0]}'?")
    unknown = set(data.targets.groups) - {case.group for case in cases}
    if unknown:
        raise ConfigError(f"{where}: targets name a group without points: {', '.join(sorted(unknown))}")
    for case in cases:
        if not any(rule.take and _applies(rule, case) for rule in data.open):
            case.checked(where)
        for rule in data.open:
            if _applies(rule, case):
                list(case.candidates(rule, where))
    return data, cases


def _all_cases(data: DataSet, where: str) -> list[Case]:
    experiment = None if data.experiment is None else load_experiment(HERE / data.experiment)
    if not data.points and experiment is None:
        raise ConfigError(f"{where}: has no points; give some, or an experiment that has")
    if not data.points and experiment is not None:
        return _cases_of(experiment)
    panel = None if experiment is None else experiment.predicted
    groups = merge({} if panel is None else panel.frameworks, data.groups)
    shared = data.defaults.strategy if panel is None else merge({"compute": panel.precision}, data.defaults.strategy)
    return [_case(data, point, shared, groups, where) for point in data.points]


def rules_for(data: DataSet, case: Case) -> list[Open]:
    """Return the rules that are executed for a point."""
    return [rule for rule in data.open if rule.take is not None and _applies(rule, case)]


def _applies(rule: Open, case: Case) -> bool:
    return rule.labels is None or case.label in rule.labels


def _mentions(data: DataSet) -> Iterator[tuple[str, Sequence[str]]]:
    for ratio in data.ratios:
        yield "ratios", (ratio.slower, ratio.faster)
    for rule in data.open:
        yield "open", rule.points or ()
    for variant in data.variants:
        yield "variants", [*(variant.points or ()), *variant.strategies]


def find_data_sets(names: Sequence[str] = ()) -> list[Path]:
    """Return the files of the data sets by name (or path), by default all. Raises `ConfigError` for an unknown name."""
    known = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"), key=_by_number)}
    if not names:
        return list(known.values())
    paths = []
    for name in names:
        path = Path(name) if name.endswith(".yaml") else known.get(name)
        if path is None:
            raise ConfigError(f"there is no data set '{name}'; known are {', '.join(known)}")
        paths.append(path)
    return paths


def _by_number(path: Path) -> list[str | int]:
    """Return a key that sorts Figure 11 after Figure 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


def _case(
    data: DataSet, point: SetPoint, shared: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]], where: str
) -> Case:
    def value_of(key: str) -> Any:
        of_point, default = getattr(point, key), getattr(data.defaults, key)
        if of_point is None and default is None:
            raise ConfigError(f"{where}: point '{point.label}' has no {key}, nor have the defaults; add it to one")
        return default if of_point is None else of_point

    if point.group and groups and point.group not in groups:
        raise ConfigError(f"{where}: point '{point.label}' is of group '{point.group}'; known are {', '.join(groups)}")
    names: tuple[Quantity, ...] = get_args(Quantity)
    published = {name: value for name in names if (value := getattr(point.parts, name)) is not None}
    if point.published is not None:
        published[data.quantity] = point.published
    return Case(
        label=point.label,
        group=point.group,
        model=model_of(value_of("model"), where=f"{where}: point '{point.label}'"),
        gpus=point.gpus,
        batch_size=value_of("batch_size"),
        strategy=merge(merge(shared, groups.get(point.group, {})), point.strategy),
        published=published,
        note=point.note,
    )


def case_of(panel: PredictedPanel, point: PredictedPoint) -> Case:
    """Return a point of an experiment file, without published numbers."""
    return Case(
        label=f"{point.name} {point.framework}",
        group=point.framework,
        model=load_model(point.model),
        gpus=point.gpus,
        batch_size=point.batch_size or panel.batch_size,
        strategy=strategy_fields(panel, point.framework, point.strategy),
        published={},
    )


def _cases_of(experiment: Experiment) -> list[Case]:
    panel = experiment.predicted
    if panel is None or experiment.published is None:
        raise ConfigError(f"the experiment {experiment.name} has no published and predicted points of its own")
    published = {(r.point, r.ran.framework): _seconds(r) for r in read_records(ROOT / experiment.published)}
    return [
        replace(
            case_of(panel, point),
            label=f"{point.model} {point.framework}",
            published={"batch_time_s": _published(published, point, experiment)},
        )
        for point in panel.points
    ]


def _seconds(record: Record) -> float:
    if record.batch_time_s is None:
        raise RecordError(f"the published record of {record.point} has no batch_time_s, which a data set needs; add it")
    return record.batch_time_s


def _published(seconds: Mapping[tuple[str, str], float], point: PredictedPoint, experiment: Experiment) -> float:
    if (point.name, point.framework) not in seconds:
        raise RecordError(f"{experiment.published}: has no record of {point.name} {point.framework}; add it")
    return seconds[point.name, point.framework]
