"""Seconds of the tasks of each stage: kernels and tensor-parallel collectives of its layers."""

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
    """Times of a chunk's tasks for one microbatch, by `Kind`; all properties are seconds.

    `input`: the input half of a backward, including recomputation. `reduce_*`: waiting for tensor-parallel
    collectives.
    """

    tasks: tuple[TaskTime, ...]

    def of(self, kind: Kind) -> float:
        """Return the seconds of a task."""
        return self.tasks[kind].total

    @property
    def forward(self) -> float:
        """Seconds of the forward, including collectives that are not hidden."""
        return self.of(Kind.FORWARD)

    @property
    def backward(self) -> float:
        """Seconds of the backward, including collectives that are not hidden."""
        return self.of(Kind.BACKWARD)

    @property
    def input(self) -> float:
        """Seconds of a backward for the input gradient alone."""
        return self.of(Kind.INPUT)

    @property
    def weight(self) -> float:
        """Seconds of a backward for the weight gradients alone."""
        return self.of(Kind.WEIGHT)

    @property
    def reduce_forward(self) -> float:
        """Seconds of the forward spent waiting for collectives."""
        return self.tasks[Kind.FORWARD].waited

    @property
    def reduce_backward(self) -> float:
        """Seconds of the backward spent waiting for collectives."""
        return self.tasks[Kind.BACKWARD].waited


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Times of one stage for one microbatch, summed over its chunks; all properties are seconds."""

    chunks: tuple[ChunkTimes, ...]

    @property
    def forward(self) -> float:
        """Seconds of the forward, including collectives that are not hidden."""
        return sum(c.forward for c in self.chunks)

    @property
    def backward(self) -> float:
        """Seconds of the backward, including collectives that are not hidden."""
        return sum(c.backward for c in self.chunks)

    @property
    def reduce_forward(self) -> float:
        """Seconds of the forward spent waiting for collectives."""
        return sum(c.reduce_forward for c in self.chunks)

    @property
    def reduce_backward(self) -> float:
        """Seconds of the backward spent waiting for collectives."""
        return sum(c.reduce_backward for c in self.chunks)


def stage_times(outline: ModelOutline, machine: MachineFile, strategy: Strategy) -> list[StageTimes]:
    """Return the times of every stage. Raises `ConfigError` when there are more chunks than layers."""
    model = _Times(strategy.laid_out(outline), machine, strategy)
    return [
        StageTimes(chunks=tuple(model.chunk(stage, chunk, span) for chunk, span in enumerate(spans)))
        for stage, spans in enumerate(strategy.spans_of_stages(outline))
    ]


def link_times(outline: ModelOutline, machine: MachineFile, strategy: Strategy) -> tuple[list[ChunkTimes], ChunkTimes]:
    """Return the times of (every link, the loss) on the first stage, without recomputation or gathering of messages.

    With overdecomposition a link's time is what it adds to the previous one, under whose collectives its lanes compute.
    """
    model = _Times(outline, machine, strategy.model_copy(update={"recompute": "none", "partition_messages": False}))
    # Tasks begin with host time, links do not.
    model.start = []
    places = _Places(model, 0)
    cache: dict[tuple[int, ...], ChunkTimes] = {}

    def of(*links: int) -> ChunkTimes:
        key = tuple(id(outline.links[i].parts) for i in links)
        if key not in cache:
            cache[key] = model.times(places, range(links[0], links[-1] + 1), source=False, sink=False)
        return cache[key]

    loss = model.times(places, range(0), source=False, sink=True)
    if strategy.overdecomposition == 1:
        return [of(i) for i in range(len(outline.links))], loss
    return [of(0), *(_difference(of(i - 1, i), of(i - 1)) for i in range(1, len(outline.links)))], loss


def _difference(both: ChunkTimes, first: ChunkTimes) -> ChunkTimes:
    pairs = zip(both.tasks, first.tasks, strict=True)
    return ChunkTimes(tasks=tuple(TaskTime(b.total - f.total, b.waited - f.waited) for b, f in pairs))


def kernels_of(machine: MachineFile, strategy: Strategy) -> Kernels:
    """Return the kernel times of a rank while all ranks of its node compute."""
    busy = min(strategy.logical_grid.size, machine.node.gpus.number)
    return Kernels(machine.gpu, element=BYTES[strategy.compute], busy=busy)


_NumberedLayer = tuple[int, LayerCost]
"""A layer, with the number of its link."""


class _Times:
    """Times of chunks; equal chunks are computed once."""

    def __init__(self, outline: ModelOutline, machine: MachineFile, strategy: Strategy) -> None:
        self.outline, self.machine, self.strategy = outline, machine, strategy
        self.grid = strategy.process_grid(machine)
        self.kernels = kernels_of(machine, strategy)
        host = machine.gpu.host
        self.start = [] if host is None else [TaskSegment(host.task.si)]
        self.layout = strategy.schedule.layout(self.grid.inter)
        share, rest = divmod(strategy.microbatch_size, strategy.overdecomposition)
        self.rows = [share + (lane < rest) for lane in range(strategy.overdecomposition)]
        self._chunks: dict[object, ChunkTimes] = {}
        self._layers: dict[object, list[TaskSegment]] = {}

    def chunk(self, stage: int, chunk: int, span: range) -> ChunkTimes:
        places = _Places(self, stage)
        source, sink = self.layout.is_source(stage, chunk), self.layout.is_sink(stage, chunk)
        key = (places.key, source, sink, tuple(id(self.outline.links[i].parts) for i in span))
        if key not in self._chunks:
            self._chunks[key] = self.times(places, span, source=source, sink=sink)
        return self._chunks[key]

    def times(self, places: _Places, span: range, *, source: bool, sink: bool) -> ChunkTimes:
        layers = [(i, layer) for i in span for layer in self.outline.links[i].parts.values()]
        layers += [(span.stop - 1, self.outline.loss)] if sink else []
        recomputed = self._recomputed(span)
        gather = [TaskSegment(0.0, places.gather)]

        def lanes(*directions: tuple[str, Sequence[_NumberedLayer]], first: list[TaskSegment]) -> TaskTime:
            task: list[list[TaskSegment]] = []
            links_of_turns: list[tuple[int, ...]] = []
            for rows in self.rows:
                segments = [] if task else [*self.start, *first]
                ends, link = [0 for segment in segments if segment.exchange > 0], 0
                for direction, directed_layers in directions:
                    for i, layer in directed_layers:
                        link = i - span.start
                        of_layer = self._of_layer(places, layer, rows, direction)
                        segments += of_layer
                        ends += [link for segment in of_layer if segment.exchange > 0]
                task.append(joined(segments))
                links_of_turns.append((*ends, link))
            return task_time(task, slowdown=self.machine.beside_collectives)._replace(layers=tuple(links_of_turns))

        forward = lanes(("forward", layers), first=[] if source else gather)
        before = [] if sink else gather
        backward = lanes(("forward", recomputed), ("backward", layers[::-1]), first=before)
        input_half = lanes(("forward", recomputed), ("input", layers[::-1]), first=before)
        weight_half = lanes(("weight", layers[::-1]), first=[])
        return ChunkTimes(tasks=(forward, backward, input_half, weight_half))

    def _recomputed(self, span: range) -> list[_NumberedLayer]:
        """Return the layers whose forward is recomputed."""
        match self.strategy.recompute:
            case "full":
                return recomputed_links(self.outline, span, self.strategy.checkpoint_layers)
            case "selective":
                layers = ((i, layer) for i in span for layer in self.outline.links[i].parts.values())
                return [(i, layer) for i, layer in layers if isinstance(layer, AttentionCoreCost)]
            case "none":
                return []

    def _of_layer(self, places: _Places, layer: LayerCost, rows: int, direction: str) -> list[TaskSegment]:
        key = (places.key, layer, rows, direction)
        if key not in self._layers:
            self._layers[key] = list(self._segments(places, layer, rows, direction))
        return self._layers[key]

    def _segments(self, places: _Places, layer: LayerCost, rows: int, direction: str) -> Iterator[TaskSegment]:
        work = work_of(layer, self.grid, rows)
        if direction == "weight":
            yield TaskSegment(self._seconds(work.weight))
            return
        forward = direction == "forward"
        exchanges = layer.forward(self.grid, rows) if forward else layer.backward(self.grid, rows)
        compute = self._seconds(work.forward if forward else work.backward)
        weight = self._seconds(work.weight) if direction == "backward" else 0.0
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
        for name, along in axes.items():
            self._places[name] = place(grid, along, rank, times.machine)
        self.key = tuple(self._places.values())
        message = max((link.message(grid, times.strategy.microbatch_size) for link in times.outline.links), default=0)
        nbytes = self.element * message * grid.row
        # All-gathering a partitioned message takes half an all-reduce; with sequence parallelism it stays cut.
        partition = times.strategy.partition_messages and not times.strategy.sequence_parallel
        self.gather = all_reduce_time(times.machine, nbytes, self._places["both"]) / 2 if partition else 0.0

    def seconds(self, exchange: Exchange) -> float:
        """Return the seconds of a collective; an all-gather or reduce-scatter takes half an all-reduce."""
        where = self._places[exchange.axis]
        nbytes = exchange.elements * (4 if exchange.wide and self.element < 4 else self.element)
        if exchange.kind == "all-gather":
            return all_reduce_time(self.machine, nbytes * where.ranks, where) / 2
        seconds = all_reduce_time(self.machine, nbytes, where)
        return seconds / 2 if exchange.kind == "reduce-scatter" else seconds
