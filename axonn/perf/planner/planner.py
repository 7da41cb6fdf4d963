"""Planner: the best configurations of our engine for a model, a machine and a number of ranks.

All configurations are estimated in closed form (`axonn.perf.planner.closed_form`). Of those that fit, the fastest by
that estimate are simulated, a few per grid; then the finalists are tried with other in-flight limits, bucket sizes and
coarsening factors. The configurations returned are predicted in full.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from axonn.errors import AxonnError, ConfigError
from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.pipeline.extrapolation import pipeline_seconds
from axonn.perf.planner.closed_form import Candidate, ClosedForm, Estimate, Extents, Shape
from axonn.perf.planner.search_space import BSIZES, COARSENING, Space
from axonn.perf.prediction import Prediction, predict
from axonn.perf.strategy import Strategy
from axonn.perf.timing.memory_model import DoesNotFit
from axonn.perf.timing.stage_times import stage_times
from axonn.perf.timing.update_times import step_times

SIMULATED, OF_A_GRID = 32, 4
"""Number of candidates that are simulated, and how many of them may share a grid."""
FINALISTS = 5
"""Number of candidates whose in-flight limits, bucket sizes and coarsening factors are searched."""
SHOWN = 10
"""Number of configurations that are returned by default."""

OnProgress = Callable[[str, int, int], None]
"""Callback with the name of the current step, how much of it is done, and the total."""


@dataclass(frozen=True, kw_only=True)
class Plannable:
    """A model to plan for. `outline(row, col)`: the model on that tensor grid; raises `ConfigError` if it does not fit.

    `stages`: whether it can be cut into pipeline stages.
    """

    name: str
    outline: Callable[[int, int], ModelOutline]
    stages: bool = True


@dataclass
class Discarded:
    """Discarded configurations: their number and an example, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    nearest: tuple[int, Candidate] | None = None
    """The configuration that lacks the least memory, after the bytes that it lacks."""

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count discarded configurations, with an example."""
        self.counts[reason] += count
        self.examples.setdefault(reason, example)

    def short_of_memory(self, lacking: int, candidate: Candidate) -> None:
        """Keep the configuration that lacks the fewest bytes."""
        if self.nearest is None or lacking < self.nearest[0]:
            self.nearest = lacking, candidate


@dataclass(frozen=True, kw_only=True)
class PlannedStrategy:
    """A configuration with its prediction."""

    strategy: Strategy
    prediction: Prediction

    @property
    def seconds(self) -> float:
        """Predicted seconds per batch."""
        return self.prediction.batch_time_s


@dataclass(frozen=True, kw_only=True)
class StrategyPlan:
    """The best configurations, fastest first. `estimated`, `simulated`: how many were; `estimating_s`: seconds."""

    best: list[PlannedStrategy]
    estimated: int
    estimating_s: float
    simulated: int
    discarded: Discarded


def plan(
    model: Plannable,
    machine: MachineFile,
    space: Space,
    *,
    shown: int = SHOWN,
    on_progress: OnProgress = lambda step, done, total: None,
) -> StrategyPlan:
    """Return the `shown` best configurations of `space`.

    Raises `ConfigError` when the machine has fewer GPUs or no configuration is possible, and `DoesNotFit` when none
    fits in memory.
    """
    machine.check_gpus(space.gpus)
    search = _Search(model, machine, space, on_progress)
    begun = time.perf_counter()
    fitting = search.fitting()
    seconds = time.perf_counter() - begun
    if not fitting:
        raise search.nothing()
    ranked = search.simulated(_chosen(fitting))
    ranked = search.refined(ranked)
    return StrategyPlan(
        best=search.predicted(ranked, shown),
        estimated=search.estimated,
        estimating_s=seconds,
        simulated=len(search.times),
        discarded=search.discarded,
    )


class _Search:
    def __init__(self, model: Plannable, machine: MachineFile, space: Space, on_progress: OnProgress) -> None:
        self.model, self.machine, self.space, self.on_progress = model, machine, space, on_progress
        self.closed = ClosedForm(
            model.outline,
            machine,
            batch_size=space.batch_size,
            compute=space.precision,
            algorithm=space.algorithm,
            order=space.order,
            fixed=space.fixed,
        )
        self.discarded = Discarded()
        self.capacity = int((1 - space.reserve) * machine.gpu.memory.si)
        """Bytes of a device that a configuration may use."""
        self._problems: dict[tuple[int, int], str] = {}
        self.estimated = 0
        self.times: dict[tuple[object, ...], float] = {}
        """Seconds of the pipelines simulated so far."""

    def fitting(self) -> list[tuple[Estimate, Candidate]]:
        """Return all candidates that fit with their estimates, fastest first."""
        fitting = []
        grids = self.space.grids()
        capacity = self.capacity
        for done, grid in enumerate(grids):
            self.on_progress("estimating", done, len(grids))
            for candidate in self._candidates(grid):
                estimate = self.closed.estimate(candidate)
                self.estimated += 1
                if estimate.needs > capacity:
                    self.discarded.add("device memory", _shown(candidate))
                    self.discarded.short_of_memory(estimate.needs - capacity, candidate)
                elif estimate.host > self.machine.node.host_memory.si:
                    self.discarded.add("host memory for the offloaded optimizer", _shown(candidate))
                else:
                    fitting.append((estimate, candidate))
        self.on_progress("estimating", len(grids), len(grids))
        return sorted(fitting, key=lambda pair: pair[0].seconds)

    def _candidates(self, grid: Extents) -> Iterator[Candidate]:
        """Yield the candidates of a grid; checkpointing "auto" is resolved to what needs the least memory."""
        data, inter, row, col = grid
        shown = f"data {data}, inter {inter}, row {row}, col {col}"
        if inter > 1 and not self.model.stages:
            return self.discarded.add("a module without a chain of layers has no stages", shown)
        if problem := self._problem(row, col):
            return self.discarded.add("the tensor axes do not divide the model's layers", f"{shown}: {problem}")
        sizes = self.space.microbatch_sizes(data)
        if not sizes:
            return self.discarded.add("the batch does not divide", shown)
        for size in sizes:
            for sub_shards in self.space.sub_shards(row * col, size):
                for schedule in self.space.schedules(inter):
                    shape = Shape(grid, size, sub_shards, schedule.chunks, schedule.placement)
                    try:
                        blocks = self.closed.stages(shape).blocks
                    except ConfigError as error:
                        self.discarded.add("more stages than layers", f"{shown}: {error}")
                        continue
                    for optimizer in self.space.optimizers():
                        # Without blocks there is nothing to recompute, so all settings are one configuration.
                        for checkpointing in self.space.checkpointings() if blocks else ("none",):
                            candidate = Candidate(shape, schedule, None, optimizer)
                            yield self._checkpointed(candidate, checkpointing, blocks)

    def _problem(self, row: int, col: int) -> str:
        """Return the reason why the model does not fit the tensor grid; empty if it fits."""
        if (row, col) not in self._problems:
            try:
                self.model.outline(row, col)
                self._problems[row, col] = ""
            except ConfigError as error:
                self._problems[row, col] = str(error)
        return self._problems[row, col]

    def _checkpointed(self, candidate: Candidate, checkpointing: str | int, blocks: int) -> Candidate:
        if checkpointing == "none":
            return candidate
        if isinstance(checkpointing, int):
            return candidate._replace(together=checkpointing)
        stages = self.closed.stages(candidate.shape)
        tried = [candidate._replace(together=n) for n in range(1, max(blocks, 1) + 1) if blocks % n == 0]
        return min(tried, key=lambda c: self.closed.needs(c, stages))

    def nothing(self) -> AxonnError:
        """Return the error of a search without a result."""
        space, where = self.space, f"{self.model.name} on {self.space.gpus} GPUs of {self.machine.name}"
        if self.discarded.nearest is not None:
            lacking, candidate = self.discarded.nearest
            capacity = self.capacity
            return DoesNotFit(
                f"{where} fits nowhere: {self.discarded.counts['device memory']} configurations need more memory than "
                f"the {capacity / 1e9:.1f} GB that a GPU has for it; the smallest needs "
                f"{(capacity + lacking) / 1e9:.1f} GB ({_shown(candidate)}). Take more GPUs, or remove pins"
            )
        reasons = "; ".join(f"{reason} ({self.discarded.examples[reason]})" for reason in self.discarded.counts)
        return ConfigError(
            f"no configuration of {where} is possible with a batch of {space.batch_size}: {reasons}; change the batch, "
            "the number of GPUs or the pins"
        )

    def simulated(self, candidates: list[Candidate]) -> list[tuple[float, Candidate]]:
        """Return the candidates with their simulated seconds per batch, fastest first."""
        timed = []
        for done, candidate in enumerate(candidates):
            self.on_progress("simulating", done, len(candidates))
            timed.append((self._seconds(candidate), candidate))
        self.on_progress("simulating", len(candidates), len(candidates))
        return sorted(timed, key=lambda pair: pair[0])

    def refined(self, ranked: list[tuple[float, Candidate]]) -> list[tuple[float, Candidate]]:
        """Return the candidates, and the finalists with all in-flight limits, each with its best bucket size."""
        candidates = dict.fromkeys(candidate for _, candidate in ranked)
        capacity = self.capacity
        for _, candidate in ranked[:FINALISTS]:
            stages = self.closed.stages(candidate.shape)
            for schedule in self.space.limits(candidate.schedule, candidate.shape.grid[1]):
                variant = candidate._replace(schedule=schedule)
                if self.closed.needs(variant, stages) <= capacity:
                    candidates[variant] = None
        with_buckets = [self._with_best_buckets(candidate) for candidate in candidates]
        return self.simulated(list(dict.fromkeys(with_buckets)))

    def _with_best_buckets(self, candidate: Candidate) -> Candidate:
        if candidate.optimizer != "offloaded":
            return candidate
        stages, capacity = self.closed.stages(candidate.shape), self.capacity
        tried = [candidate._replace(bsize=bsize, k=k) for bsize in BSIZES for k in COARSENING]
        fitting = [c for c in tried if self.closed.needs(c, stages) <= capacity]
        return min(fitting, key=lambda c: self.closed.step_seconds(c, stages), default=candidate)

    def predicted(self, ranked: list[tuple[float, Candidate]], shown: int) -> list[PlannedStrategy]:
        """Return the `shown` best candidates with their full predictions, fastest first."""
        planned = []
        for done, (_, candidate) in enumerate(ranked[:shown]):
            self.on_progress("predicting", done, shown)
            strategy = self.closed.strategy(candidate)
            outline = self.model.outline(strategy.grid.row, strategy.grid.col)
            prediction = predict(outline, self.machine, strategy, batch_size=self.space.batch_size)
            planned.append(PlannedStrategy(strategy=strategy, prediction=prediction))
        self.on_progress("predicting", shown, shown)
        return sorted(planned, key=lambda choice: choice.seconds)

    def _seconds(self, candidate: Candidate) -> float:
        """Return the seconds of a batch; the pipeline is simulated once for all optimizer settings."""
        strategy = self.closed.strategy(candidate)
        outline = self.model.outline(strategy.grid.row, strategy.grid.col)
        key = (candidate.shape, candidate.schedule, candidate.together)
        if key not in self.times:
            self.times[key] = pipeline_seconds(
                outline,
                self.machine,
                strategy,
                microbatches=self.closed.microbatches(candidate.shape),
                stages=stage_times(outline, self.machine, strategy),
            )
        return self.times[key] + sum(step_times(outline, self.machine, strategy))


def _chosen(fitting: list[tuple[Estimate, Candidate]]) -> list[Candidate]:
    """Return the fastest candidates, a few per grid, so that the variants of one do not crowd out the others."""
    taken: Counter[Extents] = Counter()
    chosen = []
    for _, candidate in fitting:
        grid = candidate.shape.grid
        if taken[grid] < OF_A_GRID:
            taken[grid] += 1
            chosen.append(candidate)
        if len(chosen) == SIMULATED:
            break
    return chosen


def _shown(candidate: Candidate) -> str:
    """Return a description of a candidate, for errors."""
    data, inter, row, col = candidate.shape.grid
    checkpointing = "" if candidate.together is None else f", checkpoints of {candidate.together}"
    return (
        f"data {data}, inter {inter}, row {row}, col {col}, microbatch {candidate.shape.microbatch_size}, "
        f"{candidate.schedule.name}{checkpointing}, optimizer {candidate.optimizer}"
    )
