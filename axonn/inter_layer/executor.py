"""Runs the tasks of one stage as its schedule asks for them, with messages to and from the other stages."""

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
from axonn.inter_layer.stage_leader import Agreement
from axonn.models.base import PipelineModel
from axonn.schedules import ChunkLayout, Direction, Forwards, Kind, StageSchedule, Task
from axonn.spans import SpanKind, SpanRecorder
from axonn.tensor import TensorContext

_TASKS_AHEAD = 1
"""How many tasks the host gives a GPU beside the one that it does: what is launched late would leave it idle."""
_LOOK_S = 50e-6
"""Between two looks for messages while the GPU computes."""


class PipelineExecutor:
    """Executes one batch after another on the stage of `rank`.

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
        self._agreement = Agreement(grid, rank, transport)
        self._timeline = timeline
        self._given: deque[DeviceEvent] = deque()
        """When the tasks that the device may still have to do are done, in order; nothing on a CPU."""
        self._microbatch_size = microbatch_size
        self._dtype = dtype
        self._device = timeline.device
        self._edges = {direction: self._edges_of(direction) for direction in Direction}
        self._announce()
        self._probe: NonFiniteDetector | None = None
        self._active_bytes = 0
        self.most_active_bytes = 0
        """Most bytes of activations that were kept for backwards at any one time so far."""

    @property
    def held(self) -> int:
        """(chunk, microbatch) pairs of which something is still held; zero between batches."""
        return sum(len(chunk.held) for chunk in self._chunks)

    def train(self, schedule: StageSchedule, batch: Batch, *, loss_scale: float) -> torch.Tensor | None:
        """Forward and backward of every microbatch; gradients of `loss_scale` x sum of microbatch losses accumulate.

        Returns the sum of losses (a scalar without a graph, not scaled) where the network ends, None elsewhere.
        """
        self._expect(schedule.microbatches, *Direction)
        probe = self._probe = self._new_probe(schedule.microbatches)
        self._drive(schedule, lambda task: self._train(task, batch, loss_scale, probe), self._timeline.spans)
        return batch.loss()

    def poison(self) -> torch.Tensor:
        """A scalar on the device: 0, or not a number where a gradient of the last batch was not finite."""
        assert self._probe is not None, "no batch was trained"
        return self._probe.poison()

    def not_finite(self) -> list[NotFinite]:
        """What tasks of the last batch handed on that was not finite. Waits for the device."""
        return [] if self._probe is None else self._probe.found()

    def _new_probe(self, microbatches: int) -> NonFiniteDetector:
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
        """Forward only; no gradient and no parameter changes. Sum of microbatch losses where the network ends."""
        self._expect(microbatches, Direction.FORWARD)
        schedule = Forwards(stage=self._stage, stages=self._grid.inter, microbatches=microbatches, layout=self._layout)
        self._drive(schedule, lambda task: self._evaluate(task, batch), None)
        return batch.loss()

    def _drive(self, schedule: StageSchedule, run: Callable[[Task], Tensors], spans: SpanRecorder | None) -> None:
        """Run every task of a batch; `run` returns what a task hands on. Tasks and waiting go to `spans`."""
        schedule = self._agreement.begin(schedule)
        transport = self._transport
        free = SpanRecorder.now()
        while not schedule.done:
            if transport is not None:
                self._take(transport.poll(), schedule)
            self._catch_up(schedule)
            task = self._agreement.next_task(schedule)
            self._between(free, spans)
            if task is None:
                self._wait(schedule, spans)
                free = SpanRecorder.now()
                continue
            outgoing = self._timed(task, run, spans)
            self._gave()
            free = SpanRecorder.now()
            local = self._hand_on(task, outgoing)
            schedule.finished(task)
            if local is not None:
                schedule.arrived(*local)
        if transport is not None:
            transport.flush()
            self._between(free, spans)

    def _gave(self) -> None:
        """The device has been given one more task."""
        if self._device.type != "cpu":
            self._given.append(self._timeline.now())

    def _catch_up(self, schedule: StageSchedule) -> None:
        """Wait until the device has at most `_TASKS_AHEAD` tasks to do, taking messages meanwhile.

        So what is next is decided by what has arrived when the device comes to it, and not long before.
        """
        while len(self._given) > _TASKS_AHEAD:
            if self._given[0].passed:
                self._given.popleft()
            elif self._transport is None:
                self._given.popleft().synchronize()
            else:
                time.sleep(_LOOK_S)
                self._take(self._transport.poll(), schedule)

    def _between(self, free: float, spans: SpanRecorder | None) -> None:
        """Since `free`, the end of a task or of waiting, this rank has worked with messages alone; at the end of a
        batch it has waited for the last of them to leave."""
        if spans is not None and self._transport is not None:
            spans.add(SpanKind.MESSAGES, free, spans.now())

    def _announce(self) -> None:
        """Tell the transport what will be sent, so that it refuses anything else."""
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
        """Edges that bring messages of this direction to the stage, with how many chunks they serve."""
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
        """Tensors that cross the boundary after layer `boundary`; backwards only those that can have a gradient."""
        specs = self._model.activation(boundary, self._microbatch_size, self._dtype, self._context)
        return tuple(s for s in specs if direction == Direction.FORWARD or s.dtype.is_floating_point)

    def _peer(self, stage: int) -> int:
        here = self._grid.coordinates(self._rank)
        return self._grid.rank(data=here.data, inter=stage, row=here.row, col=here.col)

    def _expect(self, microbatches: int, *directions: Direction) -> None:
        if self._transport is not None:
            for direction in directions:
                for edge, chunks in self._edges[direction].items():
                    self._transport.expect(edge, microbatches * chunks)

    def _take(self, messages: Sequence[Message], schedule: StageSchedule) -> None:
        for address, tensors in messages:
            self._put(address, tensors)
            schedule.arrived(*address)

    def _put(self, address: Address, tensors: Tensors) -> None:
        self._chunks[address.chunk].put(address.direction, address.microbatch, tensors)

    def _wait(self, schedule: StageSchedule, spans: SpanRecorder | None) -> None:
        assert self._transport is not None, "a schedule of one stage never waits"
        start = SpanRecorder.now()
        messages = self._transport.wait()
        self._take(messages, schedule)
        if spans is None:
            return
        if not messages:
            # What ended was waiting for a decision, which has no microbatch before it is known.
            spans.add(SpanKind.RECEIVE_WAIT, start, spans.now())
            return
        # Waiting ended with the first message; that one was waited for.
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
        """Run a task and record when it computed, which is when it did not wait for a collective of the tensor axes."""
        if spans is None:
            return run(task)
        timeline = self._timeline
        start = timeline.now()
        layer = self._chunks[task.chunk].module.span.start
        with self._context.task(microbatch=task.microbatch, layer=layer, chunk=task.chunk) as inside:
            outgoing = run(task)
        begins = [start, *(end for _, end in inside.blocked)]
        ends = [*(begin for begin, _ in inside.blocked), timeline.now()]
        kind = SpanKind(task.kind.label)
        for begin, end, shard in zip(begins, ends, inside.turns or [-1], strict=True):
            timeline.span(kind, begin, end, microbatch=task.microbatch, layer=layer, chunk=task.chunk, shard=shard)
        return outgoing

    def _evaluate(self, task: Task, batch: Batch) -> Tensors:
        output = self._chunks[task.chunk].evaluate(task.microbatch, batch)
        if self._transport is not None:
            # One message under way at a time: without backwards nothing else bounds what piles up downstream.
            self._transport.flush()
        return output

    def _train(self, task: Task, batch: Batch, loss_scale: float, probe: NonFiniteDetector) -> Tensors:
        """Run a task; what it hands on (nothing where the network begins or ends, and from weight halves)."""
        kind, chunk, microbatch = task
        state = self._chunks[chunk]
        if kind == Kind.FORWARD:
            outgoing = state.forward(microbatch, batch)
            # Where the network ends, its loss is what comes out.
            probe.note(Direction.FORWARD, chunk, microbatch, outgoing or (batch.losses[microbatch],))
            self._active_bytes += state.saved_bytes or 0
            self.most_active_bytes = max(self.most_active_bytes, self._active_bytes)
            return outgoing
        if kind == Kind.INPUT:
            outgoing = state.backward_input(microbatch, batch, loss_scale=loss_scale)
            probe.note(Direction.BACKWARD, chunk, microbatch, outgoing)
            return outgoing
        outgoing = ()
        if kind == Kind.WEIGHT:
            state.backward_weight(microbatch)
        else:
            outgoing = state.backward(microbatch, batch, loss_scale=loss_scale)
            probe.note(Direction.BACKWARD, chunk, microbatch, outgoing)
        self._active_bytes -= state.saved_bytes or 0
        return outgoing

    def _hand_on(self, task: Task, tensors: Tensors) -> Address | None:
        """Send what a task made; where it stays on this stage, the address at which it has arrived."""
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
