"""What an experiment file says: the points of one figure, to be predicted at a published scale and measured here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field

from axonn.config import (
    GPTConfig,
    GridConfig,
    ModelConfig,
    OptimizerConfig,
    StrictModel,
    TrainConfig,
    UNetConfig,
    load_yaml,
    read_yaml,
    validate,
)
from axonn.errors import ConfigError
from axonn.perf.machine import MachineFile, load_machine
from axonn.perf.strategy import Strategy

HERE = Path(__file__).parent
ROOT = HERE.parent


class PredictedPoint(StrictModel):
    """One bar or dot at the published scale; `strategy` holds what differs from the framework's own defaults."""

    framework: str
    model: str
    gpus: int = Field(ge=1)
    strategy: dict[str, Any]


class PredictedPanel(StrictModel):
    """Points for the performance model. `frameworks`: what all points of a framework share."""

    machine: str
    batch_size: int = Field(ge=1)
    precision: str
    frameworks: dict[str, dict[str, Any]]
    points: list[PredictedPoint]


class MeasuredPanel(StrictModel):
    """Weak scaling on this machine: `layers_per_rank` layers for each rank, one stage per rank, the batch fixed.

    Every rank count from 1 to `max_ranks` (default: the cores of this machine), doubling, runs with each framework, all
    of it `repeats` times in turn, since one run says little on a shared machine.
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
    batches: int = Field(ge=2)
    warmup_batches: int = Field(ge=0)
    repeats: int = Field(ge=1)
    max_ranks: int | None = Field(default=None, ge=1)
    loss_tolerance: float = Field(gt=0)
    """Largest relative difference of the frameworks' losses at which their times may be compared."""
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()


class Experiment(StrictModel):
    """One figure."""

    name: str
    title: str
    published: str
    """Record file with the published points, relative to the repository."""
    predicted: PredictedPanel
    measured: MeasuredPanel


def load_experiment(path: Path | str) -> Experiment:
    """Read and check an experiment file, every strategy included. Raises `ConfigError`."""
    experiment = load_yaml(path, Experiment)
    for point in experiment.predicted.points:
        strategy_of(experiment.predicted, point, where=str(path))
    unknown = {p.framework for p in experiment.predicted.points} - set(experiment.predicted.frameworks)
    if unknown:
        raise ConfigError(f"{path}: predicted.points name frameworks without an entry in frameworks: {sorted(unknown)}")
    return experiment


def strategy_of(panel: PredictedPanel, point: PredictedPoint, *, where: str) -> Strategy:
    """The framework's defaults with the point's own values over them."""
    merged = merge(panel.frameworks.get(point.framework, {}), point.strategy)
    return validate(merged, Strategy, where=f"{where}: {point.framework} {point.model}")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `base` with those of `over` in their place, key by key at every depth."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def load_model(name: str) -> ModelConfig:
    """A model of experiments/models by name, or a model file by path."""
    path = Path(name) if name.endswith(".yaml") else _find("models", name)
    content = read_yaml(path)
    if isinstance(content, dict) and content.get("kind") == "unet":
        return load_yaml(path, UNetConfig)
    return load_yaml(path, GPTConfig)


def find_machine(name: str) -> MachineFile:
    """A machine of experiments/machines by name, or a machine file by path."""
    return load_machine(Path(name) if name.endswith(".yaml") else _find("machines", name))


def _find(folder: str, name: str) -> Path:
    path = HERE / folder / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in (HERE / folder).glob("*.yaml"))
        near = get_close_matches(name, known, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f"there is no {folder[:-1]} '{name}'; {hint}known are {', '.join(known)}")
    return path


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def measured_configs(panel: MeasuredPanel) -> list[TrainConfig]:
    """The work of each measured rank count, smallest first."""
    most = panel.max_ranks or available_cores()
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
            grid=GridConfig(inter=ranks),
            batch_size=panel.microbatch_size * microbatches,
            microbatch_size=panel.microbatch_size,
            optimizer=panel.optimizer,
            seed=panel.seed,
            steps=panel.batches,
        )
        for ranks in counts
    ]
