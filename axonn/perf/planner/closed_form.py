"""Closed-form estimate of batch time and memory of a configuration of our engine, fast enough to search all of them.

It uses the same model of a stage as the simulator (kernels, collectives, messages, memory) but runs no schedule: a
pipeline takes its fill and drain, and one period per microbatch. It prunes; the simulator ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from axonn.config.optimizer_config import DEFAULT_ALGORITHM
from axonn.config.train_config import FloatType, PrecisionConfig, TrainConfig
from axonn.grid import AXES, TENSOR_AXES, Axis, ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.machine.network import GroupPlacement, StageEdge, edge, message_time, place
from axonn.perf.planner.engine_strategy import strategy_of_config
from axonn.perf.planner.schedule_properties import bubble, in_flight, most_held, splits_backward
from axonn.perf.prediction import message_bytes
from axonn.perf.strategy import OptimizerPlacement, Strategy
from axonn.perf.timing.memory_model import (
    LinkBytes,
    activation_bytes,
    host_bytes,
    link_bytes,
    loss_bytes,
    model_state_bytes,
)
from axonn.perf.timing.stage_times import ChunkTimes, link_times
from axonn.perf.timing.update_times import step_time
from axonn.schedules import ChunkPlacement, ScheduleSpec

Extents = tuple[int, int, int, int]
"""G_data, G_inter, G_row, G_col."""


class Shape(NamedTuple):
    """The part of a configuration that determines the durations of its tasks."""

    grid: Extents
    microbatch_size: int
    sub_shards: int = 1
    chunks: int = 1
    placement: ChunkPlacement = "loop"


class Candidate(NamedTuple):
    """A configuration. `together`: blocks per activation checkpoint, None without checkpointing."""

    shape: Shape
    schedule: ScheduleSpec
    together: int | None
    optimizer: OptimizerPlacement
    bsize: int = 4_000_000
    k: int = 4


class Estimate(NamedTuple):
    """Estimate of a candidate: seconds of a batch, and bytes of the fullest device and of the fullest node's host."""

    seconds: float
    needs: int
    host: int


@dataclass(frozen=True)
class Stages:
    """The stages of a shape: seconds of a microbatch, parameters and bytes, each by stage."""

    forward: Sequence[float]
    backward: Sequence[float]
    again: Sequence[float]
    """Seconds of the forward of the blocks, which checkpointing recomputes."""
    weight: Sequence[float]
    """Seconds of the part of the backward that computes only gradients of parameters."""
    parameters: Sequence[int]
    activations: Callable[[int | None], Sequence[tuple[int, int]]]
    """Bytes (saved per microbatch, working) for a number of blocks per checkpoint, by stage."""
    blocks: int
    """Blocks in the chunk with the most of them."""

    @cached_property
    def most_parameters(self) -> int:
        return max(self.parameters)


class _Table(NamedTuple):
    """Prefix sums over the links, for cutting the chain anywhere."""

    forward: list[float]
    backward: list[float]
    again: list[float]
    weight: list[float]
    loss: ChunkTimes
    links: list[LinkBytes]
    loss_bytes: int


class _Cut(NamedTuple):
    """A partition of the chain: links of each stage's chunks, stage with the end of the network, parameters of each
    stage, and blocks of the chunk with the most of them."""

    spans: list[list[range]]
    sink: int
    parameters: list[int]
    blocks: int


class ClosedForm:
    """Estimator of candidates for a machine, a batch and a compute type; it caches what candidates have in common.

    `outline(row, col)`: the model on that tensor grid. `fixed`: fields of `Strategy` that differ from our engine.
    """

    def __init__(
        self,
        outline: Callable[[int, int], ModelOutline],
        machine: MachineFile,
        *,
        batch_size: int,
        compute: FloatType = "float16",
        order: tuple[Axis, ...] = AXES,
        algorithm: str = DEFAULT_ALGORITHM,
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        self.outline = outline
        self.machine = machine
        self.batch_size = batch_size
        self.compute: FloatType = compute
        self.order = order
        any_model = GPTConfig(name="any", layers=1, hidden=1, heads=1, seq_len=1, vocab=2)
        # Settings of the engine that no configuration changes.
        precision = PrecisionConfig(compute=compute)
        engine = strategy_of_config(TrainConfig(model=any_model, batch_size=1, microbatch_size=1, precision=precision))
        self._engine = engine.model_copy(update={"algorithm": algorithm, **(fixed or {})})
        self._cuts: dict[object, _Cut] = {}
        self._tables: dict[object, _Table] = {}
        self._stages: dict[object, Stages] = {}
        self._places: dict[object, tuple[GroupPlacement, ...]] = {}
        self._edges: dict[Extents, StageEdge] = {}
        self._messages: dict[object, float] = {}
        self._steps: dict[object, float] = {}

    def strategy(self, candidate: Candidate) -> Strategy:
        """Return the strategy with which the engine runs a candidate."""
        shape = candidate.shape
        data, inter, row, col = shape.grid
        found = {
            "grid": ProcessGrid(data=data, inter=inter, row=row, col=col),
            "order": self.order,
            "microbatch_size": shape.microbatch_size,
            "schedule": candidate.schedule,
            "optimizer": candidate.optimizer,
            "bsize": candidate.bsize,
            "k": candidate.k,
            "recompute": "none" if candidate.together is None else "full",
            "checkpoint_layers": candidate.together or 1,
            "compute": self.compute,
            "overdecomposition": shape.sub_shards,
        }
        return self._engine.model_copy(update=found)

    def microbatches(self, shape: Shape) -> int:
        """Return the microbatches per pipeline."""
        return self.batch_size // (shape.grid[0] * shape.microbatch_size)

    def estimate(self, candidate: Candidate) -> Estimate:
        """Return the estimate for a candidate. Raises `GridError` like `stages`."""
        stages = self.stages(candidate.shape)
        seconds = self._pipeline(candidate, stages) + self.step_seconds(candidate, stages)
        needs = self.needs(candidate, stages)
        offloaded = candidate.optimizer == "offloaded"
        algorithm = self._engine.algorithm
        host = host_bytes(stages.most_parameters, self.machine, self.compute, algorithm) if offloaded else 0
        return Estimate(seconds, needs, host)

    def needs(self, candidate: Candidate, stages: Stages) -> int:
        """Return the bytes of the fullest device, with as many microbatches per stage as the schedule can ever hold."""
        held = most_held(candidate.schedule, candidate.shape.grid[1], self.microbatches(candidate.shape))
        state = {
            phi: model_state_bytes(
                phi,
                optimizer=candidate.optimizer,
                bsize=candidate.bsize,
                buckets=self._engine.buckets_resident,
                compute=self.compute,
                algorithm=self._engine.algorithm,
            )
            for phi in set(stages.parameters)
        }
        activations = stages.activations(candidate.together)
        return max(
            state[phi] + count * kept + working
            for phi, count, (kept, working) in zip(stages.parameters, held, activations, strict=True)
        )

    def stages(self, shape: Shape) -> Stages:
        """Return the stages of a shape. Raises `GridError` when there are more chunks than links."""
        _, inter, row, col = shape.grid
        places = self._placed(shape.grid)[1:]
        key = (shape[1:], inter, row, col, places)
        if key not in self._stages:
            self._stages[key] = self._staged(self._cut(shape), self._table(shape, places))
        return self._stages[key]

    def _cut(self, shape: Shape) -> _Cut:
        """Return the partition of the chain, which does not depend on the microbatches."""
        _, inter, row, col = shape.grid
        key = (inter, row, col, shape.chunks, shape.placement)
        if key not in self._cuts:
            outline, grid = self.outline(row, col), ProcessGrid(row=row, col=col)
            schedule = ScheduleSpec(chunks=shape.chunks, placement=shape.placement)
            spans = self.strategy(Candidate(shape, schedule, None, "device")).spans_of_stages(outline)
            self._cuts[key] = _Cut(
                spans=spans,
                sink=schedule.layout(inter).place(inter * shape.chunks - 1)[0],
                parameters=[sum(outline.parameters(mine, grid).values()) for mine in spans],
                blocks=max(len({outline.links[i].block for i in span} - {None}) for mine in spans for span in mine),
            )
        return self._cuts[key]

    def _staged(self, cut: _Cut, table: _Table) -> Stages:
        def sums(before: list[float], loss: float = 0.0) -> list[float]:
            found = [sum(before[span.stop] - before[span.start] for span in mine) for mine in cut.spans]
            found[cut.sink] += loss
            return found

        known: dict[int | None, list[tuple[int, int]]] = {}

        def activations(together: int | None) -> list[tuple[int, int]]:
            if together not in known:
                known[together] = [_of_chunks(table.links, mine, together) for mine in cut.spans]
                kept, working = known[together][cut.sink]
                known[together][cut.sink] = kept, working + table.loss_bytes
            return known[together]

        return Stages(
            forward=sums(table.forward, table.loss.forward),
            backward=sums(table.backward, table.loss.backward),
            again=sums(table.again),
            weight=sums(table.weight, table.loss.weight),
            parameters=cut.parameters,
            activations=activations,
            blocks=cut.blocks,
        )

    def _table(self, shape: Shape, places: tuple[GroupPlacement, ...]) -> _Table:
        _, _, row, col = shape.grid
        key = (row, col, shape.microbatch_size, shape.sub_shards, places)
        if key not in self._tables:
            outline = self.outline(row, col)
            strategy = self.strategy(Candidate(shape._replace(chunks=1), ScheduleSpec(), None, "device"))
            times, loss = link_times(outline, self.machine, strategy)
            self._tables[key] = _Table(
                forward=_before([t.forward for t in times]),
                backward=_before([t.backward for t in times]),
                again=_before(
                    [0.0 if link.block is None else t.forward for t, link in zip(times, outline.links, strict=True)]
                ),
                weight=_before([t.weight for t in times]),
                loss=loss,
                links=link_bytes(outline, strategy),
                loss_bytes=loss_bytes(outline, strategy),
            )
        return self._tables[key]

    def _placed(self, extents: Extents) -> tuple[GroupPlacement, ...]:
        """Return the placements, on the first stage, of the groups along data, row, col, and row x col."""
        if extents not in self._places:
            data, inter, row, col = extents
            per_node = self.machine.node.gpus.number
            grid = ProcessGrid(data=data, inter=inter, row=row, col=col, order=self.order, ranks_per_node=per_node)
            groups: tuple[tuple[Axis, ...], ...] = (("data",), *((axis,) for axis in TENSOR_AXES), TENSOR_AXES)
            self._places[extents] = tuple(place(grid, axes, 0, self.machine) for axes in groups)
        return self._places[extents]

    def _pipeline(self, candidate: Candidate, stages: Stages) -> float:
        shape, schedule = candidate.shape, candidate.schedule
        inter, count = shape.grid[1], self.microbatches(shape)
        backward = stages.backward
        if candidate.together is not None:
            backward = [b + a for b, a in zip(backward, stages.again, strict=True)]
        whole = [f + b for f, b in zip(stages.forward, backward, strict=True)]
        if inter == 1:
            return count * whole[0]
        hop = self._hop(shape)
        splits = splits_backward(schedule, inter)
        around = sum(whole) - (sum(stages.weight) if splits else 0.0) + 2 * (inter * shape.chunks - 1) * hop
        # Interleaved 1F1B takes longer if chunks are uneven; the simulator accounts for it.
        period = max(*whole, around / in_flight(schedule, inter, count))
        fill = bubble(schedule, count, period=period, whole=whole, weight=stages.weight)
        return count * period + fill + 2 * (inter - 1) * hop

    def _hop(self, shape: Shape) -> float:
        """Return the seconds of a message to the next stage."""
        key = (shape.grid, shape.microbatch_size)
        if key not in self._messages:
            _, _, row, col = shape.grid
            strategy = self.strategy(Candidate(shape._replace(chunks=1), ScheduleSpec(), None, "device"))
            grid = strategy.process_grid(self.machine)
            if shape.grid not in self._edges:
                self._edges[shape.grid] = edge(grid, 0)
            way = self._edges[shape.grid]
            self._messages[key] = message_time(
                self.machine,
                message_bytes(self.outline(row, col), strategy),
                library=strategy.message_library,
                same_node=way.same_node,
                flows=way.flows,
            ).seconds
        return self._messages[key]

    def step_seconds(self, candidate: Candidate, stages: Stages) -> float:
        """Return the seconds of the reduction and the optimizer after the pipeline."""
        where = self._placed(candidate.shape.grid)[0]
        phi = stages.most_parameters
        key = (phi, where, candidate.optimizer, candidate.bsize, candidate.k)
        if key not in self._steps:
            self._steps[key] = sum(step_time(self.machine, self.strategy(candidate), phi, where))
        return self._steps[key]


def _before(values: Sequence[float]) -> list[float]:
    """Return the sum of the values before each one, and of all of them."""
    found = [0.0]
    for value in values:
        found.append(found[-1] + value)
    return found


def _of_chunks(links: Sequence[LinkBytes], spans: Sequence[range], together: int | None) -> tuple[int, int]:
    """Return the bytes (saved, working) of all chunks of a stage."""
    each = [activation_bytes(links, span, together=together) for span in spans]
    return sum(kept for kept, _ in each), max(working for _, working in each)
