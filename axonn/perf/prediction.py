"""Prediction of batch time, its breakdown, and memory of a strategy on a machine.

Kernel times give the forward and backward of each stage, network times its messages and all-reduces, and the simulator
runs the schedule. After its last task each stage reduces its gradients over its replicas and updates its parameters
(`axonn.perf.timing.step_times`); the batch ends when the last stage is done.
There is no constant per framework, model or point: one set of machine constants serves them all.
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
    """Breakdown of a predicted batch in seconds, mean over the stages; the parts add up to the batch time."""

    compute: float
    tensor_all_reduce: float
    point_to_point: float
    bubble: float
    """Other idle time, including the end of the batch."""
    all_reduce: float
    optimizer: float
    host: float = 0.0
    """Time between batches in which the device waits for its host."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Prediction for one strategy. Times are in seconds."""

    batch_time_s: float
    parts: PredictedBreakdown
    pipeline_s: float
    """Duration of the pipeline phase, from the first forward to the last backward."""
    memories: list[Memory]
    """Memory of a rank of each stage."""
    tflops_per_gpu: float
    """Rate by the FLOPs of the outline, for a GPT `axonn.observability.records.gpt_flops`. Full recomputation counts if
    it happens; selective does not, as in the MFU of Korthikanti et al. (arXiv 2205.05198)."""
    pct_peak: float
    microbatches: int
    stages: list[StageTimes]
    simulation: Simulation
    ends: list[StageEnd]
    """Reduction and update of each stage after its last task."""
    first_layers: list[list[int]]
    """First layer of each chunk, by stage."""
    spread: JitterSpread | None = None
    """Batch times with `jitter`; all other fields are without it."""

    @property
    def memory(self) -> Memory:
        """Memory of the stage that needs most."""
        return max(self.memories, key=lambda memory: memory.total)

    @property
    def memory_parts(self) -> dict[str, int]:
        """Bytes by part, each of the stage that has most of it."""
        return {part: max(m.parts[part] for m in self.memories) for part in self.memory.parts}

    def memory_of_all(self, gpus: int) -> dict[str, int]:
        """Return the bytes of all `gpus` together, by part."""
        each = gpus // len(self.memories)
        return {part: each * sum(m.parts[part] for m in self.memories) for part in self.memory.parts}

    @property
    def last(self) -> StageEnd:
        """End of the stage that finishes last; its phases follow each other without gaps up to the end of the batch."""
        return max(self.ends, key=lambda end: end.optimizer[1])

    @property
    def fits(self) -> bool:
        """True if every stage fits into the device's memory."""
        return self.memory.fits

    def spans(self, *, only: int | None = None) -> list[Span]:
        """Return spans like those of a traced run of one replica (needs `record`); the rank is the stage.

        `only`: return those of one stage, since there may be millions. `axonn.spans.breakdown` of them gives `parts`.
        """

        def inside(stage: int, task: Task) -> TaskTime:
            return self.stages[stage].chunks[task.chunk].tasks[task.kind]

        spans = self.simulation.spans(first_layers=lambda s, c: self.first_layers[s][c], inside=inside, only=only)
        spans = [span for span in spans if span.kind != SpanKind.IDLE]
        last_tasks = {stage: end for stage, _, _, end in self.simulation.tasks}
        for stage, end in enumerate(self.ends):
            if only in (None, stage):
                spans += end.spans(stage, last_tasks[stage], self.batch_time_s)
        return spans


def predict(
    model: ModelConfig | ModelOutline,
    machine: MachineFile,
    strategy: Strategy,
    *,
    batch_size: int,
    record: bool = False,
    jitter: Jitter | None = None,
) -> Prediction:
    """Predict one batch of `batch_size` sequences or images.

    `record`: keep what `Prediction.spans` needs. `jitter`: predict the spread of batch times too. Raises `ConfigError`
    when batch, layers or tensor axes do not divide. A strategy that does not fit into memory is predicted nevertheless:
    see `Prediction.memory` and `Memory.check`.
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
    """Return batch times under jitter. Each replica has its own pipeline; a stage reduces once it is done in all."""
    times = []
    for repeat in range(jitter.repeats):
        runs = [pipeline(noise=jitter.noise(repeat, replica)).ends for replica in range(replicas)]
        noise = jitter.noise(repeat)
        noisy_steps = [StepTime(step.reduction * noise(), step.optimizer * noise()) for step in steps]
        slowest = [max(ends) for ends in zip(*runs, strict=True)]
        times.append(max(end.optimizer[1] for end in finished(slowest, noisy_steps)))
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
    """Simulate the pipeline phase of one replica; replicas differ only by `noise`.

    `record`: keep the messages, which spans need.
    """
    count = len(stages)
    spec = strategy.schedule
    host_seconds = _host_seconds(outline, machine, strategy)
    times = [
        [[chunk.of(kind) + host_seconds(index, kind, c) for c, chunk in enumerate(stage.chunks)] for kind in Kind]
        for index, stage in enumerate(stages)
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


def _host_seconds(outline: ModelOutline, machine: MachineFile, strategy: Strategy) -> Callable[[int, Kind, int], float]:
    """Return a function of (stage, kind, chunk): the host time of a task, to choose it and for its messages.

    It is 0 if the device does not wait for its host.
    """
    layout = strategy.schedule.layout(strategy.grid.inter)
    host = machine.gpu.host
    curve = None if host is None else host.messages.get(strategy.message_library)
    per_message = 0.0 if curve is None else curve.seconds(message_bytes(outline, strategy))
    per_task = 0.0 if host is None or host.pipelined is None or layout.stages == 1 else host.pipelined.si

    def seconds(stage: int, kind: Kind, chunk: int) -> float:
        sends = kind.sends
        # A forward receives from the stage that backwards send to, and vice versa.
        receives = {Kind.FORWARD: Direction.BACKWARD, Kind.BACKWARD: Direction.FORWARD, Kind.INPUT: Direction.FORWARD}
        directions = [sends, receives.get(kind)]
        peers = [layout.target(stage, chunk, direction) for direction in directions if direction is not None]
        return per_task + per_message * sum(peer is not None and peer[0] != stage for peer in peers)

    return seconds


def messages(outline: ModelOutline, machine: MachineFile, strategy: Strategy) -> Callable[[int, int], MessageTime]:
    """Return a function of (sender, receiver): the time of a message between two stages.

    All messages have the size of the largest of the chain; activations and gradients are equally large.
    """
    grid = strategy.process_grid(machine)
    nbytes = message_bytes(outline, strategy)

    def time(sender: int, receiver: int) -> MessageTime:
        between = edge(grid, min(sender, receiver), max(sender, receiver))
        return message_time(
            machine, nbytes, library=strategy.message_library, same_node=between.same_node, flows=between.flows
        )

    return time


def message_bytes(outline: ModelOutline, strategy: Strategy) -> float:
    """Return the bytes of a message from a rank to the next stage, the largest of the chain."""
    grid = strategy.logical_grid
    largest = max(link.message(grid, strategy.microbatch_size) for link in outline.links)
    return BYTES[strategy.compute] * largest / strategy.message_parts
