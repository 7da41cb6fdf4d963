"""Seconds of the tasks of each stage: its layers' kernels and tensor-parallel collectives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from axonn.grid import Axis
from axonn.perf.layers.kernel_operations import MemoryBoundKernel, Operation
from axonn.perf.layers.layer_cost import Exchange, LayerCost
from axonn.perf.layers.layer_work import work_of
from axonn.perf.layers.local_layers import AttentionCoreCost
from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.machine.kernel_times import Kernels
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.machine.network import GroupPlacement, all_reduce_time, place
from axonn.perf.strategy import Strategy
from axonn.perf.timing.communication import BYTES, recomputed_links
from axonn.perf.timing.task_times import TaskSegment, TaskTime, joined, task_time
from axonn.schedules import Kind


@dataclass(frozen=True, kw_only=True)
class ChunkTimes:
    """Times of a chunk's tasks for one microbatch, by `Kind`; its numbers are seconds.

    `input`: the input half of a backward, recomputation included. `reduce_*`: waiting for tensor-parallel
    communication.
    """

    tasks: tuple[TaskTime, ...]

    def of(self, kind: Kind) -> float:
        """Seconds of a task."""
        return self.tasks[kind].total

    @property
    def forward(self) -> float:
        """Seconds, with the collectives that are not hidden."""
        return self.of(Kind.FORWARD)

    @property
    def backward(self) -> float:
        """Seconds, with the collectives that are not hidden."""
        return self.of(Kind.BACKWARD)

    @property
    def input(self) -> float:
        """Seconds of the gradient of the input alone."""
        return self.of(Kind.INPUT)

    @property
    def weight(self) -> float:
        """Seconds of the gradients of the weights alone."""
        return self.of(Kind.WEIGHT)

    @property
    def reduce_forward(self) -> float:
        """Seconds of these in which it waits for collectives."""
        return self.tasks[Kind.FORWARD].waited

    @property
    def reduce_backward(self) -> float:
        """Seconds of these in which it waits for collectives."""
        return self.tasks[Kind.BACKWARD].waited


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Seconds per microbatch of one stage, its chunks together."""

    chunks: tuple[ChunkTimes, ...]

    @property
    def forward(self) -> float:
        """Seconds, with the collectives that are not hidden."""
        return sum(c.forward for c in self.chunks)

    @property
    def backward(self) -> float:
        """Seconds, with the collectives that are not hidden."""
        return sum(c.backward for c in self.chunks)

    @property
    def reduce_forward(self) -> float:
        """Seconds of these in which it waits for collectives."""
        return sum(c.reduce_forward for c in self.chunks)

    @property
    def reduce_backward(self) -> float:
        """Seconds of these in which it waits for collectives."""
        return sum(c.reduce_backward for c in self.chunks)


def stage_times(outline: ModelOutline, machine: MachineFile, strategy: Strategy) -> list[StageTimes]:
    """Of every stage. Raises `ConfigError` when there are more chunks than layers."""
    model = _Times(strategy.laid_out(outline), machine, strategy)
    return [
        StageTimes(chunks=tuple(model.chunk(stage, chunk, span) for chunk, span in enumerate(spans)))
        for stage, spans in enumerate(strategy.spans_of_stages(outline))
    ]


def link_times(outline: ModelOutline, machine: MachineFile, strategy: Strategy) -> tuple[list[ChunkTimes], ChunkTimes]:
    """(every link, the loss) on the first stage, without recomputation and without gathering messages.

    What a link adds to the one before it, since its lanes compute under that one's collectives.
    """
    model = _Times(outline, machine, strategy.model_copy(update={"recompute": "none", "partition_messages": False}))
    # Tasks begin with some time of the host, links do not.
    model.start = []
    places = _Places(model, 0)
    found: dict[tuple[int, ...], ChunkTimes] = {}

    def of(*links: int) -> ChunkTimes:
        key = tuple(id(outline.links[i].parts) for i in links)
        if key not in found:
            found[key] = model.times(places, range(links[0], links[-1] + 1), source=False, sink=False)
        return found[key]

    loss = model.times(places, range(0), source=False, sink=True)
    if strategy.overdecomposition == 1:
        return [of(i) for i in range(len(outline.links))], loss
    return [of(0), *(_difference(of(i - 1, i), of(i - 1)) for i in range(1, len(outline.links)))], loss


def _difference(whole: ChunkTimes, part: ChunkTimes) -> ChunkTimes:
    pairs = zip(whole.tasks, part.tasks, strict=True)
    return ChunkTimes(tasks=tuple(TaskTime(w.total - p.total, w.waited - p.waited) for w, p in pairs))


def kernels_of(machine: MachineFile, strategy: Strategy) -> Kernels:
    """The kernels of a rank, all ranks of its node computing beside it."""
    busy = min(strategy.logical_grid.size, machine.node.gpus.number)
    return Kernels(machine.gpu, element=BYTES[strategy.compute], busy=busy)


_Placed = tuple[int, LayerCost]
"""A layer with the number of its link."""


class _Times:
    """Times of chunks, those of equal chunks computed once."""

    def __init__(self, outline: ModelOutline, machine: MachineFile, strategy: Strategy) -> None:
        self.outline, self.machine, self.strategy = outline, machine, strategy
        self.grid = strategy.process_grid(machine)
        self.kernels = kernels_of(machine, strategy)
        host = machine.gpu.host
        self.start = [] if host is None else [TaskSegment(host.task.si)]
        self.layout = strategy.schedule.layout(self.grid.inter)
        share, rest = divmod(strategy.microbatch_size, strategy.overdecomposition)
        self.rows = [share + (lane < rest) for lane in range(strategy.overdecomposition)]
        self._found: dict[object, ChunkTimes] = {}
        self._parts: dict[object, list[TaskSegment]] = {}

    def chunk(self, stage: int, chunk: int, span: range) -> ChunkTimes:
        places = _Places(self, stage)
        source, sink = self.layout.is_source(stage, chunk), self.layout.is_sink(stage, chunk)
        key = (places.key, source, sink, tuple(id(self.outline.links[i].parts) for i in span))
        if key not in self._found:
            self._found[key] = self.times(places, span, source=source, sink=sink)
        return self._found[key]

    def times(self, places: _Places, span: range, *, source: bool, sink: bool) -> ChunkTimes:
        parts = [(i, part) for i in span for part in self.outline.links[i].parts.values()]
        parts += [(span.stop - 1, self.outline.loss)] if sink else []
        again = self._recomputed(span)
        gather = [TaskSegment(0.0, places.gather)]

        def lanes(*directions: tuple[str, Sequence[_Placed]], first: list[TaskSegment]) -> TaskTime:
            found: list[list[TaskSegment]] = []
            layers: list[tuple[int, ...]] = []
            for rows in self.rows:
                segments = [] if found else [*self.start, *first]
                ends, layer = [0 for segment in segments if segment.exchange > 0], 0
                for way, which in directions:
                    for i, part in which:
                        layer = i - span.start
                        own = self._of_part(places, part, rows, way)
                        segments += own
                        ends += [layer for segment in own if segment.exchange > 0]
                found.append(joined(segments))
                layers.append((*ends, layer))
            return task_time(found, slowdown=self.machine.beside_collectives)._replace(layers=tuple(layers))

        forward = lanes(("forward", parts), first=[] if source else gather)
        before = [] if sink else gather
        backward = lanes(("forward", again), ("backward", parts[::-1]), first=before)
        halves = lanes(("forward", again), ("input", parts[::-1]), first=before)
        weight = lanes(("weight", parts[::-1]), first=[])
        return ChunkTimes(tasks=(forward, backward, halves, weight))

    def _recomputed(self, span: range) -> list[_Placed]:
        """The layers whose forward runs again."""
        match self.strategy.recompute:
            case "full":
                return recomputed_links(self.outline, span, self.strategy.checkpoint_layers)
            case "selective":
                parts = ((i, part) for i in span for part in self.outline.links[i].parts.values())
                return [(i, part) for i, part in parts if isinstance(part, AttentionCoreCost)]
            case "none":
                return []

    def _of_part(self, places: _Places, part: LayerCost, rows: int, way: str) -> list[TaskSegment]:
        key = (places.key, part, rows, way)
        if key not in self._parts:
            self._parts[key] = list(self._segments(places, part, rows, way))
        return self._parts[key]

    def _segments(self, places: _Places, part: LayerCost, rows: int, way: str) -> Iterator[TaskSegment]:
        work = work_of(part, self.grid, rows)
        if way == "weight":
            yield TaskSegment(self._seconds(work.weight))
            return
        forward = way == "forward"
        exchanges = part.forward(self.grid, rows) if forward else part.backward(self.grid, rows)
        compute = self._seconds(work.forward if forward else work.backward)
        weight = self._seconds(work.weight) if way == "backward" else 0.0
        overlap = self.strategy.overlap_input_gradients
        for exchange in exchanges:
            seconds = places.seconds(exchange)
            if exchange.when == "before":
                yield TaskSegment(0.0, seconds)
            elif exchange.when == "beside" and overlap:
                yield TaskSegment(0.0, seconds, compute)
                compute = 0.0
            elif exchange is exchanges[-1] and overlap:
                yield TaskSegment(compute, seconds, weight)
                compute = weight = 0.0
            else:
                yield TaskSegment(compute, seconds)
                compute = 0.0
        yield TaskSegment(compute + weight)

    def _seconds(self, operations: Iterable[Operation]) -> float:
        in_place = self.strategy.accumulate == "in-place"
        return self.kernels.total(
            o for o in operations if not (in_place and isinstance(o, MemoryBoundKernel) and o.kind == "accumulate")
        )


class _Places:
    """Seconds of the tensor-parallel collectives of one stage."""

    def __init__(self, times: _Times, stage: int) -> None:
        self.machine = times.machine
        self.element = BYTES[times.strategy.compute]
        grid = times.grid
        rank = grid.rank(inter=stage)
        self._places: dict[str, GroupPlacement] = {}
        axes: dict[str, tuple[Axis, ...]] = {"row": ("row",), "col": ("col",), "both": ("row", "col")}
        for name, which in axes.items():
            self._places[name] = place(grid, which, rank, times.machine)
        self.key = tuple(self._places.values())
        message = max((link.message(grid, times.strategy.microbatch_size) for link in times.outline.links), default=0)
        whole = self.element * message * grid.row
        # Half an all-reduce puts the parts of a partitioned message together, unless they are what is computed with.
        partition = times.strategy.partition_messages and not times.strategy.sequence_parallel
        self.gather = all_reduce_time(times.machine, whole, self._places["both"]) / 2 if partition else 0.0

    def seconds(self, exchange: Exchange) -> float:
        """A gather takes half an all-reduce of what is gathered, and so does a sum that is scattered."""
        where = self._places[exchange.axis]
        nbytes = exchange.elements * (4 if exchange.wide and self.element < 4 else self.element)
        if exchange.kind == "all-gather":
            return all_reduce_time(self.machine, nbytes * where.ranks, where) / 2
        seconds = all_reduce_time(self.machine, nbytes, where)
        return seconds / 2 if exchange.kind == "reduce-scatter" else seconds
