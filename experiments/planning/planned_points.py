"""Points whose open settings the planner chooses: what their strategy gives is pinned, the rest is searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from axonn.config.model_config import ModelConfig
from axonn.config.train_config import validate
from axonn.errors import ConfigError
from axonn.models.registry import outline_of
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.planner.planner import Plannable, StrategyPlan, plan
from axonn.perf.planner.search_space import Checkpointing, Space
from axonn.perf.strategy import Strategy
from axonn.perf.timing.memory_model import DoesNotFit
from experiments.planning.planning import plannable

_PINS = ("microbatch_size", "schedule", "optimizer", "overdecomposition", "order")
"""Fields of a strategy that pins of a search have the names of; grid, recompute and compute are read apart."""
_ALWAYS_SEARCHED = ("bsize", "k")


@dataclass(frozen=True, kw_only=True)
class PlannedPoint:
    """What the planner chose. `searched`: configurations that it looked at; `fitting`: those that fit in memory.

    `refused`: why our engine would not run it, empty where it would.
    """

    strategy: Strategy
    searched: int
    fitting: int
    refused: str = ""

    @property
    def notes(self) -> list[str]:
        """For the record."""
        s, g = self.strategy, self.strategy.grid
        chosen = (
            f"planner: data {g.data}, inter {g.inter}, row {g.row}, col {g.col}, microbatch {s.microbatch_size}, "
            f"{s.overdecomposition} sub-shard(s); fastest of {self.searched} configurations, {self.fitting} fit"
        )
        uneven = (
            "layers count as if they could be cut evenly, since no configuration in which they can fits in memory: "
            f"{self.refused}"
        )
        return [chosen, *([uneven] if self.refused else [])]


def space_of_strategy(given: Mapping[str, Any], *, gpus: int, batch_size: int, where: str) -> Space:
    """What is left to search where `given`, fields of a `Strategy`, is pinned.

    What the planner never searches is as given too, and else as our engine has it. Raises `ConfigError` naming `where`
    for a field that the strategy has not, or that cannot be pinned.
    """
    known = validate({"grid": {}, "microbatch_size": 1} | dict(given), Strategy, where=where)
    foreign = [name for name in _ALWAYS_SEARCHED if name in given]
    if foreign:
        raise ConfigError(f"{where}: the planner chooses {foreign[0]}; remove it, or give the whole strategy")
    checkpointing: Checkpointing | None = None
    if "recompute" in given:
        if known.recompute == "selective":
            raise ConfigError(f"{where}: the planner knows no recompute 'selective'; say full or none")
        blocks: Checkpointing = known.checkpoint_layers if "checkpoint_layers" in given else "auto"
        checkpointing = blocks if known.recompute == "full" else "none"
    pins: dict[str, Any] = {name: getattr(known, name) for name in _PINS if name in given}
    pins |= {axis: n for axis, n in known.grid.extents().items() if axis in given.get("grid", {})}
    read = {*_PINS, "grid", "recompute", "checkpoint_layers", "compute"}
    return Space(
        gpus=gpus,
        batch_size=batch_size,
        precision=known.compute,
        checkpointing=checkpointing,
        fixed={name: getattr(known, name) for name in given if name not in read},
        **pins,
    )


def planned(
    model: ModelConfig, machine: MachineFile, given: Mapping[str, Any], *, gpus: int, batch_size: int, where: str
) -> PlannedPoint:
    """The configuration that is predicted to be the fastest of those that our engine runs and that fit.

    Where there is none, layers count as cut evenly on every grid, as they do in a prediction of a given strategy, and
    the answer says so. Raises `ConfigError` where no configuration is possible, and `DoesNotFit` where none fits.
    """
    space = space_of_strategy(given, gpus=gpus, batch_size=batch_size, where=where)
    engine = plannable(model)
    try:
        return _found(plan(engine, machine, space, shown=1))
    except (ConfigError, DoesNotFit):
        if not model.predicted_when_uneven:
            # Nor would it be predicted.
            raise
        outline = outline_of(model)
        anyhow = Plannable(name=model.name, outline=lambda row, col: outline)
        found = _found(plan(anyhow, machine, space, shown=1))
    grid = found.strategy.grid
    try:
        engine.outline(grid.row, grid.col)
    except ConfigError as error:
        return replace(found, refused=str(error).partition(";")[0])
    return found


def _found(made: StrategyPlan) -> PlannedPoint:
    lacking = sum(count for reason, count in made.discarded.counts.items() if "memory" in reason)
    return PlannedPoint(strategy=made.best[0].strategy, searched=made.estimated, fitting=made.estimated - lacking)
