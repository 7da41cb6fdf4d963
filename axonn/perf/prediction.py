"""Batch time, its parts, and memory of a strategy on a machine.

Kernel times give each stage its forward and backward, network times its messages and all-reduces, and the simulator
runs the schedule. After its last task each stage reduces its gradients over its replicas and updates its parameters
(`axonn.perf.timing.step_times`); the batch ends with the last of them.
No number in here belongs to a framework, a model or a point (DESIGN section 6).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from axonn.config.model_config import ModelConfig
from axonn.models.registry import outline_of
from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.machine.network import MessageTime, edge, message_time
from axonn.perf.pipeline.simulator import Simulation, simulate
from axonn.perf.strategy import Strategy
from axonn.perf.timing.communication import BYTES
from axonn.perf.timing.jitter import Jitter, JitterSpread
from axonn.perf.timing.memory_model import Memory, stage_memory
from axonn.perf.timing.stage_times import StageTimes, stage_times
from axonn.perf.timing.step_times import StageEnd, finish, flag_time, ties_of
from axonn.perf.timing.task_times import TaskTime
from axonn.perf.timing.update_times import StepTime, stage_steps
from axonn.schedules import Direction, Kind, Task, make_schedule
from axonn.spans import Span, SpanKind


@dataclass(frozen=True, kw_only=True)
class PredictedBreakdown:
    """Seconds of a batch, mean over the stages; they add up to the batch time."""

    compute: float
    tensor_all_reduce: float
    point_to_point: float
    bubble: float
    """Idle otherwise, at the end of the batch too."""
    all_reduce: float
    optimizer: float
    host: float = 0.0
    """Between batches, where the device waits for its host."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says about one strategy. Times in seconds."""

    batch_time_s: float
    parts: PredictedBreakdown
    pipeline_s: float
    """The pipeline phase: from the first forward to the last backward."""
    memories: list[Memory]
    """Of a rank of each stage."""
    tflops_per_gpu: float
    """By `axonn.observability.records.gpt_flops`, full recomputation counted where it happens; selective is not, as in the MFU of
    Korthikanti et al. (arXiv 2205.05198)."""
    pct_peak: float
    microbatches: int
    stages: list[StageTimes]
    simulation: Simulation
    ends: list[StageEnd]
    """What each stage does after its last task."""
    first_layers: list[list[int]]
    """By stage and chunk."""
    spread: JitterSpread | None = None
    """With `jitter`; everything else is without."""

    @property
    def memory(self) -> Memory:
        """Of the stage that needs most."""
        return max(self.memories, key=lambda memory: memory.total)

    @property
    def memory_parts(self) -> dict[str, int]:
        """Bytes by part, each of the stage that has most of it."""
        return {part: max(m.parts[part] for m in self.memories) for part in self.memory.parts}

    def memory_of_all(self, gpus: int) -> dict[str, int]:
        """Bytes of all `gpus` together, by part."""
        each = gpus // len(self.memories)
        return {part: each * sum(m.parts[part] for m in self.memories) for part in self.memory.parts}

    @property
    def last(self) -> StageEnd:
        """Of the stage that ends last, whose phases follow each other up to the end of the batch."""
        return max(self.ends, key=lambda end: end.optimizer[1])

    @property
    def fits(self) -> bool:
        """Whether every stage fits into the device's memory."""
        return self.memory.fits

    def spans(self, *, only: int | None = None) -> list[Span]:
        """Spans as a traced run of one replica writes them, the rank being the stage (needs `record`); or those of the
        stage `only`, for there may be millions.

        `axonn.spans.breakdown` of them gives the parts.
        """

        def inside(stage: int, task: Task) -> TaskTime:
            return self.stages[stage].chunks[task.chunk].tasks[task.kind]

        found = self.simulation.spans(first_layers=lambda s, c: self.first_layers[s][c], inside=inside, only=only)
        found = [span for span in found if span.kind != SpanKind.IDLE]
        last_tasks = {stage: end for stage, _, _, end in self.simulation.tasks}
        for stage, end in enumerate(self.ends):
            if only in (None, stage):
                found += end.spans(stage, last_tasks[stage], self.batch_time_s)
        return found


def predict(
    model: ModelConfig | ModelOutline,
    machine: MachineFile,
    strategy: Strategy,
    *,
    batch_size: int,
    record: bool = False,
    jitter: Jitter | None = None,
) -> Prediction:
    """Predict one batch of `batch_size` sequences; `record` keeps what `Prediction.spans` needs, and `jitter` asks for
    the spread.

    Raises `ConfigError` when batch, layers or tensor axes do not divide. A strategy that does not fit is predicted all
    the same: see `Prediction.memory` and `Memory.check`.
    """
    if not isinstance(model, ModelOutline):
        strategy.check(model)
    outline = model if isinstance(model, ModelOutline) else outline_of(model)
    microbatches = strategy.microbatches(batch_size)
    stages = stage_times(outline, machine, strategy)
    pipeline = partial(simulate_pipeline, outline, machine, strategy, microbatches=microbatches, stages=stages)
    simulation = pipeline(record=record)
    steps = stage_steps(outline, machine, strategy, stages=stages)
    finished = partial(
        finish,
        ties=ties_of(outline, machine, strategy),
        agreement=strategy.agreement,
        flag=flag_time(machine, strategy),
    )
    ends = finished(simulation.ends, steps)
    host = 0.0 if machine.gpu.host is None else machine.gpu.host.batch.si
    total = max(end.optimizer[1] for end in ends) + host
    gpus = strategy.process_grid(machine).size
    flops = batch_size * (outline.flops_recomputing if strategy.recompute == "full" else outline.flops)
    rate = flops / total / gpus
    return Prediction(
        batch_time_s=total,
        parts=_parts(simulation, stages, ends, total, host),
        pipeline_s=simulation.makespan,
        memories=[
            stage_memory(outline, machine, strategy, stage=stage, held=held)
            for stage, held in enumerate(simulation.most_held)
        ],
        tflops_per_gpu=rate / 1e12,
        pct_peak=100 * rate / machine.gpu.peak.si,
        microbatches=microbatches,
        stages=stages,
        simulation=simulation,
        ends=ends,
        first_layers=[[span.start for span in spans] for spans in strategy.spans_of_stages(outline)],
        spread=None if jitter is None else _spread(jitter, pipeline, finished, steps, replicas=strategy.grid.data),
    )


def _parts(
    simulation: Simulation, stages: Sequence[StageTimes], ends: Sequence[StageEnd], total: float, host: float
) -> PredictedBreakdown:
    count = len(stages)
    tasks = Counter((stage, task.kind, task.chunk) for stage, task, _, _ in simulation.tasks)
    inside = sum(number * stages[s].chunks[chunk].tasks[kind].waited for (s, kind, chunk), number in tasks.items())
    busy, waited = sum(simulation.busy), sum(simulation.point_to_point)
    reducing, updating = sum(end.reducing for end in ends), sum(end.updating for end in ends)
    return PredictedBreakdown(
        compute=(busy - inside) / count,
        tensor_all_reduce=inside / count,
        point_to_point=waited / count,
        bubble=total - host - (busy + waited + reducing + updating) / count,
        all_reduce=reducing / count,
        optimizer=updating / count,
        host=host,
    )


def _spread(
    jitter: Jitter,
    pipeline: Callable[..., Simulation],
    finished: Callable[..., list[StageEnd]],
    steps: Sequence[StepTime],
    *,
    replicas: int,
) -> JitterSpread:
    """Each replica has a pipeline of its own; a stage reduces once it is done in all of them."""
    times = []
    for repeat in range(jitter.repeats):
        runs = [pipeline(noise=jitter.noise(repeat, replica)).ends for replica in range(replicas)]
        noise = jitter.noise(repeat)
        own = [StepTime(step.reduction * noise(), step.optimizer * noise()) for step in steps]
        times.append(max(end.optimizer[1] for end in finished([max(stage) for stage in zip(*runs, strict=True)], own)))
    return JitterSpread(tuple(times))


def simulate_pipeline(
    outline: ModelOutline,
    machine: MachineFile,
    strategy: Strategy,
    *,
    microbatches: int,
    stages: Sequence[StageTimes],
    record: bool = False,
    noise: Callable[[], float] | None = None,
) -> Simulation:
    """The pipeline phase of one replica; all replicas are alike, but for `noise`. `record` keeps the messages, for
    spans."""
    count = len(stages)
    spec = strategy.schedule
    of_host = _of_pipelining(outline, machine, strategy)
    times = [
        [[chunk.of(kind) + of_host(stage, kind, c) for c, chunk in enumerate(own.chunks)] for kind in Kind]
        for stage, own in enumerate(stages)
    ]

    def seconds(stage: int, task: Task) -> float:
        return times[stage][task[0]][task[1]]

    return simulate(
        [make_schedule(spec, stage=stage, stages=count, microbatches=microbatches) for stage in range(count)],
        seconds=seconds,
        message=messages(outline, machine, strategy),
        blocking=strategy.blocking_messages,
        record=record,
        noise=noise,
    )


def _of_pipelining(
    outline: ModelOutline, machine: MachineFile, strategy: Strategy
) -> Callable[[int, Kind, int], float]:
    """Seconds of a task of a stage's chunk in which its core chooses it, and sends and receives messages; none where
    the device does not wait for its host."""
    layout = strategy.schedule.layout(strategy.grid.inter)
    host = machine.gpu.host
    curve = None if host is None else host.messages.get(strategy.message_library)
    one = 0.0 if curve is None else curve.seconds(message_bytes(outline, strategy))
    between = 0.0 if host is None or host.pipelined is None or layout.stages == 1 else host.pipelined.si

    def seconds(stage: int, kind: Kind, chunk: int) -> float:
        sends = kind.sends
        # What a forward receives comes from where backwards send to, and the other way round.
        receives = {Kind.FORWARD: Direction.BACKWARD, Kind.BACKWARD: Direction.FORWARD, Kind.INPUT: Direction.FORWARD}
        ways = [sends, receives.get(kind)]
        targets = [layout.target(stage, chunk, way) for way in ways if way is not None]
        return between + one * sum(target is not None and target[0] != stage for target in targets)

    return seconds


def messages(outline: ModelOutline, machine: MachineFile, strategy: Strategy) -> Callable[[int, int], MessageTime]:
    """Time of a message from one stage to another, the largest of the chain; activations and gradients are equal."""
    grid = strategy.process_grid(machine)
    nbytes = message_bytes(outline, strategy)

    def time(sender: int, receiver: int) -> MessageTime:
        way = edge(grid, min(sender, receiver), max(sender, receiver))
        return message_time(machine, nbytes, library=strategy.message_library, same_node=way.same_node, flows=way.flows)

    return time


def message_bytes(outline: ModelOutline, strategy: Strategy) -> float:
    """Of a message from a rank to the next stage, the largest of the chain."""
    grid = strategy.logical_grid
    largest = max(link.message(grid, strategy.microbatch_size) for link in outline.links)
    return BYTES[strategy.compute] * largest / strategy.message_parts
