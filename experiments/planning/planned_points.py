"""Points whose open settings the planner chooses: given fields of the strategy are pinned, the others are searched."""

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
"""Fields of a strategy that are pins of a search under the same name; grid, recompute and compute are not."""
_ALWAYS_SEARCHED = ("bsize", "k")


@dataclass(frozen=True, kw_only=True)
class PlannedPoint:
    """Choice of the planner. `searched`: number of estimated configurations; `fitting`: of those that fit in memory.

    `refused`: why the suite's engine would not run it, empty where it would.
    """

    strategy: Strategy
    searched: int
    fitting: int
    refused: str = ""

    @property
    def notes(self) -> list[str]:
        """Notes for the record."""
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


def space_of_strategy(pinned: Mapping[str, Any], *, gpus: int, batch_size: int, where: str) -> Space:
    """Return the space that is left to search when the fields `pinned` of a `Strategy` are.

    Fields that the planner never searches may be pinned too, and otherwise are as in the suite's engine. Raises
    `ConfigError` naming `where` for a field that a strategy does not have, or that cannot be pinned.
    """
    known = validate({"grid": {}, "microbatch_size": 1} | dict(pinned), Strategy, where=where)
    unpinnable = [name for name in _ALWAYS_SEARCHED if name in pinned]
    if unpinnable:
        raise ConfigError(f"{where}: the planner chooses {unpinnable[0]}; remove it, or give the whole strategy")
    checkpointing: Checkpointing | None = None
    if "recompute" in pinned:
        if known.recompute == "selective":
            raise ConfigError(f"{where}: the planner knows no recompute 'selective'; say full or none")
        blocks: Checkpointing = known.checkpoint_layers if "checkpoint_layers" in pinned else "auto"
        checkpointing = blocks if known.recompute == "full" else "none"
    pins: dict[str, Any] = {name: getattr(known, name) for name in _PINS if name in pinned}
    pins |= {axis: n for axis, n in known.grid.extents().items() if axis in pinned.get("grid", {})}
    read = {*_PINS, "grid", "recompute", "checkpoint_layers", "compute"}
    return Space(
        gpus=gpus,
        batch_size=batch_size,
        precision=known.compute,
        checkpointing=checkpointing,
        fixed={name: getattr(known, name) for name in pinned if name not in read},
        **pins,
    )


def planned(
    model: ModelConfig, machine: MachineFile, pinned: Mapping[str, Any], *, gpus: int, batch_size: int, where: str
) -> PlannedPoint:
    """Return the configuration that is predicted to be the fastest of those that the engine runs and that fit.

    Where there is none, layers count as cut evenly on every grid, as they do when a given strategy is predicted, and
    `refused` says so. Raises `ConfigError` where no configuration is possible, and `DoesNotFit` where none fits.
    """
    space = space_of_strategy(pinned, gpus=gpus, batch_size=batch_size, where=where)
    engine = plannable(model)
    try:
        return _best_of(plan(engine, machine, space, shown=1))
    except (ConfigError, DoesNotFit):
        if not model.predicted_when_uneven:
            raise
        outline = outline_of(model)
        cut_evenly = Plannable(name=model.name, outline=lambda row, col: outline)
        point = _best_of(plan(cut_evenly, machine, space, shown=1))
    grid = point.strategy.grid
    try:
        engine.outline(grid.row, grid.col)
    except ConfigError as error:
        return replace(point, refused=str(error).partition(";")[0])
    return point


def _best_of(result: StrategyPlan) -> PlannedPoint:
    lacking = sum(count for reason, count in result.discarded.counts.items() if "memory" in reason)
    return PlannedPoint(strategy=result.best[0].strategy, searched=result.estimated, fitting=result.estimated - lacking)
