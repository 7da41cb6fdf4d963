"""Batch time, its parts, and memory of a strategy on a machine.

Kernel times give each stage its forward and backward, network times its messages and all-reduces, and the simulator
runs the schedule. After the pipeline come the gradient all-reduce over the data-parallel group and the optimizer step.
No number in here belongs to a framework, a model or a point (DESIGN section 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from axonn.config import GPTConfig
from axonn.errors import ConfigError
from axonn.grid import Axis
from axonn.perf.kernels import HALF, SINGLE, KernelTimes, stream_time
from axonn.perf.machine import MachineFile
from axonn.perf.memory import Memory, stage_memory, stage_parameters
from axonn.perf.network import GroupPlacement, MessageTime, all_reduce_time, edge, message_time, place
from axonn.perf.simulator import Simulation, simulate
from axonn.perf.strategy import Strategy
from axonn.records import gpt_flops
from axonn.schedules import Kind, Task, make_schedule
from axonn.trace import Span, SpanKind

_STEP_BYTES = 36
"""Bytes that an Adam step moves per parameter on the device: descale the half-precision gradient (2 in, 4 out), then
gradient (4), weight and two moments in and out (24), half-precision weight out (2)."""
_STREAMED = 12
"""Bytes per parameter that the offloaded optimizer moves over the host link each way: weight and two moments."""


@dataclass(frozen=True, kw_only=True)
class ChunkTimes:
    """Seconds per microbatch of one chunk of a stage; `reduce_*` is the share of tensor-parallel communication."""

    forward: float
    backward: float
    weight: float
    """The part of the backward that a weight half takes; the rest is the input half, recomputation included."""
    reduce_forward: float
    reduce_backward: float

    def of(self, kind: Kind) -> float:
        """Seconds of a task."""
        return (self.forward, self.backward, self.backward - self.weight, self.weight)[kind]


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Seconds per microbatch of one stage, its chunks together."""

    chunks: tuple[ChunkTimes, ...]

    @property
    def forward(self) -> float:
        return sum(c.forward for c in self.chunks)

    @property
    def backward(self) -> float:
        return sum(c.backward for c in self.chunks)

    @property
    def reduce_forward(self) -> float:
        return sum(c.reduce_forward for c in self.chunks)

    @property
    def reduce_backward(self) -> float:
        return sum(c.reduce_backward for c in self.chunks)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Seconds of a batch, mean over the stages; they add up to the batch time."""

    compute: float
    tensor_all_reduce: float
    point_to_point: float
    bubble: float
    all_reduce: float
    optimizer: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says about one strategy. Times in seconds."""

    batch_time_s: float
    parts: Parts
    pipeline_s: float
    """The pipeline phase: from the first forward to the last backward."""
    memory: Memory
    """Of the stage that needs most."""
    tflops_per_gpu: float
    """By `axonn.records.gpt_flops`, recomputation counted where it happens."""
    pct_peak: float
    microbatches: int
    stages: list[StageTimes]
    simulation: Simulation

    @property
    def fits(self) -> bool:
        """Whether every stage fits into the device's memory."""
        return self.memory.fits

    def spans(self) -> list[Span]:
        """Spans as a traced run of one replica writes them, the rank being the stage (needs `record`).

        `axonn.trace.breakdown` of them gives the parts; all-reduces of tensor parallelism are inside of the tasks.
        """
        found = self.simulation.spans()
        reduced = self.pipeline_s + self.parts.all_reduce
        for stage in range(len(self.stages)):
            found.append(Span(stage, SpanKind.ALL_REDUCE, 0, -1, -1, -1, self.pipeline_s, reduced))
            found.append(Span(stage, SpanKind.OPTIMIZER, 0, -1, -1, -1, reduced, self.batch_time_s))
        return found


def predict(
    model: GPTConfig, machine: MachineFile, strategy: Strategy, *, batch_size: int, record: bool = False
) -> Prediction:
    """Predict one batch of `batch_size` sequences; `record` keeps what `Prediction.spans` needs.

    Raises `ConfigError` when batch, layers or tensor axes do not divide. A strategy that does not fit is predicted all
    the same: see `Prediction.memory` and `Memory.check`.
    """
    strategy.check(model)
    microbatches = strategy.microbatches(batch_size)
    stages = stage_times(model, machine, strategy)
    simulation = simulate_pipeline(model, machine, strategy, microbatches=microbatches, stages=stages, record=record)
    reduction, optimizer = step_times(model, machine, strategy)
    count = len(stages)
    busy = sum(simulation.busy) / count
    inside = sum(microbatches * (s.reduce_forward + s.reduce_backward) for s in stages) / count
    total = simulation.makespan + reduction + optimizer
    gpus = strategy.process_grid(machine).size
    flops = gpt_flops(
        batch=batch_size,
        seq_len=model.seq_len,
        layers=model.layers,
        hidden=model.hidden,
        vocab=model.vocab,
        recompute=strategy.recompute,
    )
    rate = flops / total / gpus
    memories = [
        stage_memory(model, machine, strategy, stage=stage, held=ceil(held / strategy.schedule.chunks))
        for stage, held in enumerate(simulation.most_held)
    ]
    return Prediction(
        batch_time_s=total,
        parts=Parts(
            compute=busy - inside,
            tensor_all_reduce=inside,
            point_to_point=sum(simulation.point_to_point) / count,
            bubble=sum(simulation.bubble) / count,
            all_reduce=reduction,
            optimizer=optimizer,
        ),
        pipeline_s=simulation.makespan,
        memory=max(memories, key=lambda m: m.total),
        tflops_per_gpu=rate / 1e12,
        pct_peak=100 * rate / machine.gpu.peak.si,
        microbatches=microbatches,
        stages=stages,
        simulation=simulation,
    )


def simulate_pipeline(
    model: GPTConfig,
    machine: MachineFile,
    strategy: Strategy,
    *,
    microbatches: int,
    stages: Sequence[StageTimes],
    record: bool = False,
) -> Simulation:
    """The pipeline phase of one replica; all replicas are alike. `record` keeps the messages, for spans."""
    count = len(stages)
    spec = strategy.schedule.spec()
    times = [[[chunk.of(kind) for chunk in stage.chunks] for kind in Kind] for stage in stages]

    def seconds(stage: int, task: Task) -> float:
        return times[stage][task[0]][task[1]]

    return simulate(
        [make_schedule(spec, stage=stage, stages=count, microbatches=microbatches) for stage in range(count)],
        seconds=seconds,
        message=messages(model, machine, strategy),
        blocking=strategy.blocking_messages,
        record=record,
    )


def stage_times(model: GPTConfig, machine: MachineFile, strategy: Strategy) -> list[StageTimes]:
    """Seconds per microbatch of each stage, all-reduces of tensor parallelism and gathering of messages included.

    The layers of a stage divide evenly over its chunks. Half of a backward without recomputation is its weight half,
    since the two products of a linear layer are equally large. Raises `ConfigError` when there are more chunks than
    layers.
    """
    grid = strategy.process_grid(machine)
    kernels = KernelTimes(machine.gpu, model, strategy.microbatch_size, grid.row, grid.col)
    layers = strategy.layers_of(model)
    layout = strategy.schedule.spec().layout(len(layers))
    if layout.virtual_stages > model.layers:
        raise ConfigError(
            f"{layout.stages} stages with {layout.chunks} chunks each need at least {layout.virtual_stages} layers, "
            f"{model.name} has {model.layers}"
        )

    def chunk_times(stage: int, chunk: int, count: float, reduce: _TensorReduces) -> ChunkTimes:
        forward = count * kernels.block_forward
        backward = count * (kernels.block_backward + (kernels.block_forward if strategy.recompute else 0.0))
        weight = count * kernels.block_backward / 2
        reduce_forward = count * reduce.block_forward
        reduce_backward = count * (reduce.block_backward + (reduce.block_forward if strategy.recompute else 0.0))
        if layout.is_source(stage, chunk):
            forward += kernels.embedding_forward
            backward += kernels.embedding_backward
            weight += kernels.embedding_backward
            reduce_forward += reduce.embedding
        else:
            reduce_forward += reduce.gather
        if layout.is_sink(stage, chunk):
            forward += kernels.head_forward
            backward += kernels.head_backward
            weight += kernels.head_backward / 2
            reduce_forward += reduce.head_forward
            reduce_backward += reduce.head_backward
        else:
            reduce_backward += reduce.gather
        return ChunkTimes(
            forward=forward + reduce_forward,
            backward=backward + reduce_backward,
            weight=weight,
            reduce_forward=reduce_forward,
            reduce_backward=reduce_backward,
        )

    result = []
    for stage, count in enumerate(layers):
        reduce = _TensorReduces(machine, strategy, model, stage)
        chunks = (chunk_times(stage, chunk, count / layout.chunks, reduce) for chunk in range(layout.chunks))
        result.append(StageTimes(chunks=tuple(chunks)))
    return result


class _TensorReduces:
    """Seconds of the all-reduces of one stage per microbatch (DESIGN section 5, table of 2D tensor parallelism)."""

    def __init__(self, machine: MachineFile, strategy: Strategy, model: GPTConfig, stage: int) -> None:
        grid = strategy.process_grid(machine)
        self.machine = machine
        self.row, self.col = grid.row, grid.col
        self.partition = strategy.partition_messages
        rank = grid.rank(inter=stage)
        self._places: dict[str, GroupPlacement] = {}
        axes: dict[str, tuple[Axis, ...]] = {"row": ("row",), "col": ("col",), "both": ("row", "col")}
        for name, which in axes.items():
            self._places[name] = place(grid, which, rank, machine)
        self.rows = strategy.microbatch_size * model.seq_len
        self.hidden = HALF * self.rows * model.hidden
        self.logits = HALF * self.rows * model.vocab

    def _over(self, axis: str, nbytes: float) -> float:
        return all_reduce_time(self.machine, nbytes, self._places[axis])

    @property
    def _norm(self) -> float:
        """Two moments per token, where the hidden dim is cut."""
        return self._over("row", 2 * SINGLE * self.rows)

    @property
    def block_forward(self) -> float:
        h, r, c = self.hidden, self.row, self.col
        return (
            self._over("row", 3 * h / c) + 2 * self._over("col", h / r) + self._over("row", 4 * h / c) + 2 * self._norm
        )

    @property
    def block_backward(self) -> float:
        h, r, c = self.hidden, self.row, self.col
        return 2 * self._over("col", h / r) + self._over("row", h / c) + self._over("row", 4 * h / c) + 2 * self._norm

    @property
    def embedding(self) -> float:
        return self._over("col", self.hidden / self.row)

    @property
    def head_forward(self) -> float:
        """Logits over row; largest, sum and target of the vocabulary-parallel loss over col."""
        return self._over("row", self.logits / self.col) + 3 * self._over("col", SINGLE * self.rows) + self._norm

    @property
    def head_backward(self) -> float:
        return self._over("col", self.hidden / self.row) + self._norm

    @property
    def gather(self) -> float:
        """All-gather of the parts of a partitioned message: half an all-reduce."""
        return self._over("both", self.hidden) / 2 if self.partition else 0.0


def messages(model: GPTConfig, machine: MachineFile, strategy: Strategy) -> Callable[[int, int], MessageTime]:
    """Time of a message from one stage to another; activations and gradients are equally large."""
    grid = strategy.process_grid(machine)
    nbytes = HALF * strategy.microbatch_size * model.seq_len * model.hidden / grid.row
    if strategy.partition_messages:
        nbytes /= grid.col

    def time(sender: int, receiver: int) -> MessageTime:
        way = edge(grid, min(sender, receiver), max(sender, receiver))
        return message_time(machine, nbytes, library=strategy.message_library, same_node=way.same_node, flows=way.flows)

    return time


def step_times(model: GPTConfig, machine: MachineFile, strategy: Strategy) -> tuple[float, float]:
    """(all-reduce, optimizer) seconds after the pipeline, of the stage that takes longest; what overlaps is counted as
    all-reduce only."""
    grid = strategy.process_grid(machine)
    worst = (0.0, 0.0)
    for stage, phi in enumerate(stage_parameters(model, strategy)):
        where = place(grid, ("data",), grid.rank(inter=stage), machine)
        if strategy.optimizer == "offloaded":
            found = _offloaded(machine, strategy, phi, where)
        else:
            # Sharded: reduce-scatter the gradients and all-gather the weights, together as much as one all-reduce.
            reduction = all_reduce_time(machine, HALF * phi, where)
            mine = phi / grid.data if strategy.optimizer == "sharded" else phi
            found = reduction, stream_time(machine.gpu, _STEP_BYTES * mine)
        worst = max(worst, found, key=sum)
    return worst


def _offloaded(machine: MachineFile, strategy: Strategy, phi: int, where: GroupPlacement) -> tuple[float, float]:
    """Chunks of k buckets are all-reduced one after the other; a chunk's optimizer runs while the next one reduces."""
    node = machine.node
    # The link carries both directions at once; the host's memory serves the devices of its socket, in and out together.
    host = node.host_memory_bandwidth.si / node.gpus_per_socket.number
    per_element = max(_STREAMED / node.host_link.si, 2 * _STREAMED / host)
    per_element += _STEP_BYTES / machine.gpu.stream_bandwidth.si
    chunk = strategy.k * strategy.bsize
    reduced = done = 0.0
    left = phi
    while left > 0:
        size = min(chunk, left)
        reduced += all_reduce_time(machine, HALF * size, where)
        done = max(done, reduced) + size * per_element
        left -= size
    return reduced, done - reduced
