"""Experiment files: the points of one figure, to be predicted at the published scale and measured on this machine.

Points at the published scale are listed in `predicted`, or are those of a published data set (`data_set`). Measured
points are those of a weak scaling (`measured`), or single configurations of `axonn train` (`runs`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field

from axonn.config.loading import LONGEST_NAME, Inside, Line, Name, is_plain, shortened
from axonn.config.model_config import ModelConfig, validate_model
from axonn.config.train_config import (
    FloatType,
    OptimizerConfig,
    StrictModel,
    TrainConfig,
    load_yaml,
    read_yaml,
    validate,
)
from axonn.errors import ConfigError, MachineError
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.observability.procfs import available_cores
from axonn.perf.machine.machine_file import MachineFile, load_machine
from axonn.perf.strategy import Strategy
from axonn.training.places import ROOT, described_file, described_names

HERE = ROOT / "experiments"
OURS = "AxoNN"
"""Label of the suite's own engine among the frameworks."""


class PredictedPoint(StrictModel):
    """One bar or dot at the published scale; `strategy` has the differences from the framework's own defaults."""

    framework: Line
    model: Line
    gpus: int = Field(ge=1)
    strategy: dict[str, Any] = {}
    label: Line | None = None
    """Name of the point if model and GPUs do not identify it; the same in its published, predicted and measured
    record."""
    batch_size: int | None = Field(default=None, ge=1)
    """Batch size, by default the panel's."""

    @property
    def name(self) -> str:
        """Name of the point in records."""
        return self.label or f"{self.model}-{self.gpus}"


class PredictedPanel(StrictModel):
    """Points for the performance model. `frameworks`: strategy fields that all points of a framework share."""

    machine: Line
    batch_size: int = Field(ge=1)
    precision: FloatType
    """Default of `compute` in every strategy."""
    frameworks: dict[str, dict[str, Any]]
    adapters: dict[str, str] = {}
    """Adapter that launches a framework on a cluster, by label, where the label is not an adapter's own."""
    planned: list[str] = []
    """Frameworks whose open strategy fields the planner chooses (`experiments.planning.planned_points`)."""
    points: list[PredictedPoint]


class Policy(StrictModel):
    """Measurement policy: numbers of batches and repeats, and the tolerance of losses."""

    batches: int = Field(ge=2)
    warmup_batches: int = Field(ge=0)
    repeats: int = Field(ge=1)
    """Repeats of all runs in turn, since a single run proves little on a shared machine."""
    loss_tolerance: float = Field(gt=0)
    """Largest relative difference of the losses of the same work at which times may be compared."""


class MeasuredPanel(Policy):
    """Weak scaling on this machine: `layers_per_rank` layers for each rank, one stage per rank, the batch fixed.

    Every rank count from 1 to `max_ranks` (default: the cores of this machine), doubling, runs with each framework.
    """

    frameworks: list[str]
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    vocab: int = Field(ge=2)
    layers_per_rank: int = Field(ge=1)
    microbatch_size: int = Field(ge=1)
    microbatches_per_rank: int = Field(ge=1)
    """Microbatches of a batch, per rank of the largest point (the same batch at every point)."""
    min_microbatches: int = Field(ge=1)
    max_ranks: int | None = Field(default=None, ge=1)
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()


class MeasuredRuns(Policy):
    """Single configurations on this machine: each of `runs`, by label, overrides keys of `defaults`.

    `model` has the keys of a model, or is the name of one in experiments/models. Runs of the same model, batch and seed
    compute the same function and must agree in their losses.
    """

    framework: str = "axonn"
    defaults: dict[str, Any] = {}
    runs: dict[Line, dict[str, Any]] = Field(min_length=1)

    def configs(self, *, where: str) -> dict[str, TrainConfig]:
        """Return the complete configurations by label. Raises `ConfigError` naming the run and the key."""
        return {
            label: validate(self._completed(keys, place := f"{where}: runs: {label}"), TrainConfig, where=place)
            for label, keys in self.runs.items()
        }

    def _completed(self, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
        config = merge(self.defaults, keys) | {"steps": self.batches}
        if isinstance(config.get("model"), str):
            try:
                config["model"] = load_model(config["model"]).model_dump(mode="json")
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
        return config


class PublishedReading(StrictModel):
    """Published numbers other than batch times."""

    file: Inside
    """A CSV table, relative to the repository."""
    source: str
    """The publication, and how the numbers were read from it."""


class Experiment(StrictModel):
    """Definition of one figure: published, predicted and measured points, and text for the report."""

    name: Name
    title: str
    published: Inside | None = None
    """Record file with the published points, relative to the repository."""
    data_set: Name | None = None
    """A set of experiments/validation that has the published and the predicted points."""
    readings: dict[str, PublishedReading] = {}
    """Other published numbers of the figure, by name."""
    ratios: Name | None = None
    """A set of experiments/validation whose published ratios the figure shows; they have no seconds."""
    predicted: PredictedPanel | None = None
    measured: MeasuredPanel | None = None
    runs: MeasuredRuns | None = None
    about: str = ""
    """Description of the figure, a paragraph for the report."""
    differs: list[str] = []
    """Differences from the published figure, and unknowns of it, with reasons; a sentence or two each."""
    spans: bool = False
    """True where the figure needs the spans of predicted points, too."""

    def model_post_init(self, context: Any) -> None:
        if self.data_set is not None and (self.predicted is not None or self.published is not None):
            raise ValueError("data_set stands for both published and predicted; give either")
        if self.measured is not None and self.runs is not None:
            raise ValueError("measured and runs are two ways to say what is measured; give one")

    @property
    def predicts(self) -> bool:
        """True where there are points for the performance model."""
        return self.predicted is not None or self.data_set is not None

    @property
    def policy(self) -> Policy | None:
        """Measurement policy; None where nothing is measured."""
        return self.measured or self.runs


def load_experiment(path: Path | str) -> Experiment:
    """Read and check an experiment file, every strategy and run included. Raises `ConfigError`."""
    experiment = load_yaml(path, Experiment)
    if experiment.runs is not None:
        experiment.runs.configs(where=str(path))
    panel = experiment.predicted
    if panel is None:
        return experiment
    for point in panel.points:
        _merged(panel, point, where=str(path))
    unknown = ({p.framework for p in panel.points} | set(panel.planned)) - set(panel.frameworks)
    if unknown:
        raise ConfigError(f"{path}: predicted names frameworks without an entry in frameworks: {sorted(unknown)}")
    return experiment


def strategy_of(panel: PredictedPanel, point: PredictedPoint, *, where: str) -> Strategy:
    """Return the strategy of a point: the framework's defaults, overridden by the point's own values.

    Raises `ConfigError` for a wrong key, and for a point whose strategy the planner chooses: only its record has that
    (`experiments.predictor`).
    """
    if point.framework in panel.planned:
        raise ConfigError(f"{where}: {point.framework} {point.model}: the planner chooses it; give the whole strategy")
    return _merged(panel, point, where=where)


def strategy_fields(panel: PredictedPanel, framework: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of a `Strategy`: `fields` of a point, over those of its framework, over those of the panel."""
    return merge(merge({"compute": panel.precision}, panel.frameworks.get(framework, {})), fields)


def _merged(panel: PredictedPanel, point: PredictedPoint, *, where: str) -> Strategy:
    """Return the strategy; fields that the planner will choose are 1 or default."""
    merged = strategy_fields(panel, point.framework, point.strategy)
    if point.framework in panel.planned:
        merged = {"grid": {}, "microbatch_size": 1} | merged
    return validate(merged, Strategy, where=f"{where}: {point.framework} {point.model}")


def strategies_by_default(experiment: Experiment) -> list[str]:
    """Return the strategy defaults that the predicted points of a file depend on, a text for each framework; fields
    that the planner chooses are in the records instead."""
    panel = experiment.predicted
    if panel is None:
        return []
    unset: dict[str, dict[str, None]] = {}
    for point in panel.points:
        if point.framework not in panel.planned:
            written = merge(panel.frameworks.get(point.framework, {}), point.strategy)
            names = (name for name in Strategy.model_fields if name not in written)
            unset.setdefault(point.framework, {}).update(dict.fromkeys(names))
    return [f"{framework}: {_with_defaults(names)}" for framework, names in unset.items()]


def _with_defaults(names: Iterable[str]) -> str:
    """Return a text of fields of a strategy with their defaults."""
    plain = Strategy(grid=ProcessGrid(), microbatch_size=1).model_dump(mode="json")
    values = {name: plain[name]["name"] if name == "schedule" else plain[name] for name in names}
    return ", ".join(f"{name} {' '.join(v) if isinstance(v, list) else v}" for name, v in values.items())


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` overridden by `over`, key by key at every depth."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def load_model(name: str) -> ModelConfig:
    """Return a model by its name in experiments/models, of the user's project or the suite, or by path."""
    path = Path(name) if name.endswith(".yaml") else _find("models", name)
    return validate_model(read_yaml(path), where=str(path))


def find_machine(name: str) -> MachineFile:
    """Return a machine by its name in experiments/machines, of the user's project or the suite, or by path."""
    return load_machine(Path(name) if name.endswith(".yaml") else _find("machines", name))


def _find(folder: str, name: str) -> Path:
    path = described_file(folder, name) if is_plain(name) else None
    if path is None:
        known = described_names(folder)
        near = get_close_matches(name, known, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        kind = MachineError if folder == "machines" else ConfigError
        raise kind(f"there is no {folder[:-1]} {shortened(name)}; {hint}known are {', '.join(known)}")
    return path


def slug(text: str) -> str:
    """Return a plain name for a text, as part of a file name; for a long text its beginning and a hash."""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")
    return name if len(name) <= LONGEST_NAME else f"{name[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def measured_configs(panel: MeasuredPanel, *, most: int | None = None) -> list[TrainConfig]:
    """Return the configuration of each measured rank count, smallest first, up to `most` (default: the panel's)."""
    most = most or panel.max_ranks or available_cores()
    counts = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
    microbatches = max(panel.min_microbatches, panel.microbatches_per_rank * counts[-1])
    return [
        TrainConfig(
            model=GPTConfig(
                name=f"gpt-{panel.layers_per_rank * ranks}x{panel.hidden}",
                layers=panel.layers_per_rank * ranks,
                hidden=panel.hidden,
                heads=panel.heads,
                seq_len=panel.seq_len,
                vocab=panel.vocab,
            ),
            grid=ProcessGrid(inter=ranks),
            batch_size=panel.microbatch_size * microbatches,
            microbatch_size=panel.microbatch_size,
            optimizer=panel.optimizer,
            seed=panel.seed,
            steps=panel.batches,
        )
        for ranks in counts
    ]
