"""Execution of one stage: runs the tasks its schedule picks, and exchanges messages with the other stages."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from axonn.device.streams import DeviceEvent, Timeline
from axonn.distributed.tensor_spec import TensorSpec
from axonn.distributed.transport import Address, Message, MessageEdge, Transport
from axonn.errors import GridError
from axonn.grid import ProcessGrid
from axonn.inter_layer.batch_shard import Batch, Tensors
from axonn.inter_layer.microbatch_compute import ChunkCompute
from axonn.inter_layer.non_finite import NonFiniteDetector, NotFinite
from axonn.inter_layer.stage import StageChunk
from axonn.inter_layer.stage_leader import StageCoordinator
from axonn.models.base import PipelineModel
from axonn.schedules import ChunkLayout, Direction, Forwards, Kind, StageSchedule, Task
from axonn.spans import SpanKind, SpanRecorder
from axonn.tensor import TensorContext

_TASKS_AHEAD = 1
"""Tasks that the host launches on a GPU ahead of the running one, so that the GPU does not fall idle."""
_POLL_INTERVAL_S = 50e-6
"""Interval between two polls for messages while the GPU computes."""


class PipelineExecutor:
    """Executor of one batch after another on the stage of `rank`.

    `transport` may be None when there is one stage. `microbatch_size` counts rows. Raises `GridError` when chunks would
    send different messages over one edge.
    """

    def __init__(
        self,
        *,
        model: PipelineModel,
        chunks: Sequence[StageChunk],
        layout: ChunkLayout,
        sub_shards: int,
        context: TensorContext,
        grid: ProcessGrid,
        rank: int,
        transport: Transport | None,
        microbatch_size: int,
        dtype: torch.dtype,
        timeline: Timeline,
    ) -> None:
        self._model = model
        self._layout = layout
        self._context = context
        self._grid = grid
        self._rank = rank
        self._stage = grid.coordinates(rank).inter
        self._chunks = [
            ChunkCompute(
                module,
                model=model,
                microbatch_size=microbatch_size,
                sub_shards=sub_shards,
                source=layout.is_source(self._stage, chunk),
                sink=layout.is_sink(self._stage, chunk),
            )
            for chunk, module in enumerate(chunks)
        ]
        self._transport = transport
        self._coordinator = StageCoordinator(grid, rank, transport)
        self._timeline = timeline
        self._launched: deque[DeviceEvent] = deque()
        """Completion events of the tasks launched on the device and not known to be done, in order; empty on a CPU."""
        self._microbatch_size = microbatch_size
        self._dtype = dtype
        self._device = timeline.device
        self._edges = {direction: self._edges_of(direction) for direction in Direction}
        self._announce()
        self._detector: NonFiniteDetector | None = None
        self._active_bytes = 0
        self.most_active_bytes = 0
        """Peak bytes of activations kept for backwards so far."""

    @property
    def held(self) -> int:
        """Number of (chunk, microbatch) pairs with tensors still held; zero between batches."""
        return sum(len(chunk.held) for chunk in self._chunks)

    def train(self, schedule: StageSchedule, batch: Batch, *, loss_scale: float) -> torch.Tensor | None:
        """Run forward and backward of every microbatch; gradients of `loss_scale` x sum of losses accumulate.

        Returns the sum of losses (a detached scalar, not scaled) on the last stage, None elsewhere.
        """
        self._expect(schedule.microbatches, *Direction)
        detector = self._detector = self._new_detector(schedule.microbatches)
        self._drive(schedule, lambda task: self._train(task, batch, loss_scale, detector), self._timeline.spans)
        return batch.loss()

    def nan_flag(self) -> torch.Tensor:
        """Return a scalar on the device: 0, or NaN if a gradient passed on in the last batch was non-finite."""
        assert self._detector is not None, "no batch was trained"
        return self._detector.nan_flag()

    def not_finite(self) -> list[NotFinite]:
        """Return the non-finite values that tasks of the last batch passed on. Waits for the device."""
        return [] if self._detector is None else self._detector.non_finite()

    def _new_detector(self, microbatches: int) -> NonFiniteDetector:
        spans = [state.module.span for state in self._chunks]
        return NonFiniteDetector(
            rank=self._rank,
            distances=[self._layout.virtual(self._stage, chunk) for chunk in range(len(spans))],
            layers=[(span.start, span.stop - 1) for span in spans],
            chunks=self._layout.virtual_stages,
            microbatches=microbatches,
            device=self._device,
        )

    @torch.no_grad()
    def evaluate(self, microbatches: int, batch: Batch) -> torch.Tensor | None:
        """Run the forward of every microbatch; return the sum of losses on the last stage, None elsewhere."""
        self._expect(microbatches, Direction.FORWARD)
        schedule = Forwards(stage=self._stage, stages=self._grid.inter, microbatches=microbatches, layout=self._layout)
        self._drive(schedule, lambda task: self._evaluate(task, batch), None)
        return batch.loss()

    def _drive(self, schedule: StageSchedule, run: Callable[[Task], Tensors], spans: SpanRecorder | None) -> None:
        """Run every task of a batch; `run` returns the tensors a task passes on. Tasks and waiting go to `spans`."""
        schedule = self._coordinator.begin(schedule)
        transport = self._transport
        idle_since = SpanRecorder.now()
        while not schedule.done:
            if transport is not None:
                self._receive(transport.poll(), schedule)
            self._limit_run_ahead(schedule)
            task = self._coordinator.next_task(schedule)
            self._record_messages(idle_since, spans)
            if task is None:
                self._wait(schedule, spans)
                idle_since = SpanRecorder.now()
                continue
            outgoing = self._timed(task, run, spans)
            self._note_launch()
            idle_since = SpanRecorder.now()
            local = self._pass_on(task, outgoing)
            schedule.finished(task)
            if local is not None:
                schedule.arrived(*local)
        if transport is not None:
            transport.flush()
            self._record_messages(idle_since, spans)

    def _note_launch(self) -> None:
        """Note that one more task has been launched on the device."""
        if self._device.type != "cpu":
            self._launched.append(self._timeline.now())

    def _limit_run_ahead(self, schedule: StageSchedule) -> None:
        """Wait until the device has at most `_TASKS_AHEAD` tasks to do, receiving messages meanwhile.

        The next task is thus chosen by what has arrived when the device gets to it, not long before.
        """
        while len(self._launched) > _TASKS_AHEAD:
            if self._launched[0].passed:
                self._launched.popleft()
            elif self._transport is None:
                self._launched.popleft().synchronize()
            else:
                time.sleep(_POLL_INTERVAL_S)
                self._receive(self._transport.poll(), schedule)

    def _record_messages(self, since: float, spans: SpanRecorder | None) -> None:
        """Record the time after `since`, the end of the last task or wait, as message handling.

        At the end of a batch this includes waiting for the last messages to leave.
        """
        if spans is not None and self._transport is not None:
            spans.add(SpanKind.MESSAGES, since, spans.now())

    def _announce(self) -> None:
        """Announce to the transport what will be sent, so that it refuses anything else."""
        if self._transport is None:
            return
        for direction in Direction:
            for chunk, state in enumerate(self._chunks):
                target = self._layout.target(self._stage, chunk, direction)
                if target is not None and target[0] != self._stage:
                    self._transport.announce(self._edge(target[0], state, direction, outwards=True))

    def _edge(self, stage: int, state: ChunkCompute, direction: Direction, *, outwards: bool) -> MessageEdge:
        span = state.module.span
        boundary = span.stop - 1 if outwards == (direction == Direction.FORWARD) else span.start - 1
        tensors = self._specs(boundary, direction)
        return MessageEdge(peer=self._peer(stage), direction=direction, tensors=tensors, device=self._device)

    def _edges_of(self, direction: Direction) -> dict[MessageEdge, int]:
        """Return the edges that bring messages of this direction to the stage, each with how many chunks it serves."""
        edges: dict[int, tuple[MessageEdge, int]] = {}
        for chunk, state in enumerate(self._chunks):
            origin = self._layout.origin(self._stage, chunk, direction)
            if origin is None or origin[0] == self._stage:
                continue
            edge = self._edge(origin[0], state, direction, outwards=False)
            peer = edge.peer
            known, count = edges.get(peer, (edge, 0))
            if known != edge:
                raise GridError(
                    f"chunks of stage {self._stage} would get different messages from rank {peer}; "
                    "set schedule.chunks to 1"
                )
            edges[peer] = (edge, count + 1)
        return dict(edges.values())

    def _specs(self, boundary: int, direction: Direction) -> tuple[TensorSpec, ...]:
        """Return the tensors that cross the boundary after layer `boundary`; backward, only those with gradients."""
        specs = self._model.activation(boundary, self._microbatch_size, self._dtype, self._context)
        return tuple(s for s in specs if direction == Direction.FORWARD or s.dtype.is_floating_point)

    def _peer(self, stage: int) -> int:
        coordinates = self._grid.coordinates(self._rank)
        return self._grid.rank(data=coordinates.data, inter=stage, row=coordinates.row, col=coordinates.col)

    def _expect(self, microbatches: int, *directions: Direction) -> None:
        if self._transport is not None:
            for direction in directions:
                for edge, chunks in self._edges[direction].items():
                    self._transport.expect(edge, microbatches * chunks)

    def _receive(self, messages: Sequence[Message], schedule: StageSchedule) -> None:
        for address, tensors in messages:
            self._put(address, tensors)
            schedule.arrived(*address)

    def _put(self, address: Address, tensors: Tensors) -> None:
        self._chunks[address.chunk].put(address.direction, address.microbatch, tensors)

    def _wait(self, schedule: StageSchedule, spans: SpanRecorder | None) -> None:
        assert self._transport is not None, "a schedule of one stage never waits"
        start = SpanRecorder.now()
        messages = self._transport.wait()
        self._receive(messages, schedule)
        if spans is None:
            return
        if not messages:
            # The wait was for a decision, which has no microbatch before it is known.
            spans.add(SpanKind.RECEIVE_WAIT, start, spans.now())
            return
        # The wait ended with the first message, so it counts as a wait for that one.
        direction, chunk, microbatch = messages[0].address
        spans.add(
            SpanKind.RECEIVE_WAIT,
            start,
            spans.now(),
            microbatch=microbatch,
            layer=self._chunks[chunk].module.span.start,
            direction=direction,
            chunk=chunk,
        )

    def _timed(self, task: Task, run: Callable[[Task], Tensors], spans: SpanRecorder | None) -> Tensors:
        """Run a task and record when it computed, leaving out waits for collectives on the tensor axes."""
        if spans is None:
            return run(task)
        timeline = self._timeline
        start = timeline.now()
        layer = self._chunks[task.chunk].module.span.start
        with self._context.task(microbatch=task.microbatch, layer=layer, chunk=task.chunk) as task_spans:
            outgoing = run(task)
        begins = [start, *(end for _, end in task_spans.blocked)]
        ends = [*(begin for begin, _ in task_spans.blocked), timeline.now()]
        kind = SpanKind(task.kind.label)
        for begin, end, shard in zip(begins, ends, task_spans.turns or [-1], strict=True):
            timeline.span(kind, begin, end, microbatch=task.microbatch, layer=layer, chunk=task.chunk, shard=shard)
        return outgoing

    def _evaluate(self, task: Task, batch: Batch) -> Tensors:
        output = self._chunks[task.chunk].evaluate(task.microbatch, batch)
        if self._transport is not None:
            # One message under way at a time: without backwards nothing else bounds the queue downstream.
            self._transport.flush()
        return output

    def _train(self, task: Task, batch: Batch, loss_scale: float, detector: NonFiniteDetector) -> Tensors:
        """Run a task and return the tensors it passes on; none at the ends of the network and for weight halves."""
        kind, chunk, microbatch = task
        state = self._chunks[chunk]
        if kind == Kind.FORWARD:
            outgoing = state.forward(microbatch, batch)
            # On the last stage the loss takes the place of outgoing tensors.
            detector.note(Direction.FORWARD, chunk, microbatch, outgoing or (batch.losses[microbatch],))
            self._active_bytes += state.saved_bytes or 0
            self.most_active_bytes = max(self.most_active_bytes, self._active_bytes)
            return outgoing
        if kind == Kind.INPUT:
            outgoing = state.backward_input(microbatch, batch, loss_scale=loss_scale)
            detector.note(Direction.BACKWARD, chunk, microbatch, outgoing)
            return outgoing
        outgoing = ()
        if kind == Kind.WEIGHT:
            state.backward_weight(microbatch)
        else:
            outgoing = state.backward(microbatch, batch, loss_scale=loss_scale)
            detector.note(Direction.BACKWARD, chunk, microbatch, outgoing)
        self._active_bytes -= state.saved_bytes or 0
        return outgoing

    def _pass_on(self, task: Task, tensors: Tensors) -> Address | None:
        """Send the output of a task; if it stays on this stage, put it in place and return its address."""
        direction = task.kind.sends
        target = None if direction is None else self._layout.target(self._stage, task.chunk, direction)
        if direction is None or target is None:
            return None
        if target[0] == self._stage:
            address = Address(direction, target[1], task.microbatch)
            self._put(address, tensors)
            return address
        self._send(target, direction, task.microbatch, tensors)
        return None

    def _send(self, target: tuple[int, int], direction: Direction, microbatch: int, tensors: Tensors) -> None:
        assert self._transport is not None
        stage, chunk = target
        self._transport.send(self._peer(stage), Address(direction, chunk, microbatch), tensors)
