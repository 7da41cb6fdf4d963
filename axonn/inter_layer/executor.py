"""Runs the tasks of one stage as its schedule asks for them, with messages to and from the other stages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from axonn.errors import GridError
from axonn.grid import ProcessGrid
from axonn.inter_layer.accumulation import WeightGradients, accumulate_in_place
from axonn.inter_layer.activations import SavedBytes
from axonn.inter_layer.stage import Chunk, Tensors
from axonn.models.base import PipelineModel
from axonn.schedules import ChunkLayout, Direction, Kind, StageSchedule, Task
from axonn.tensors import TensorSpec
from axonn.trace import SpanKind, SpanRecorder
from axonn.transport import Address, Edge, Message, Transport


class _ChunkState:
    """A chunk with what it holds of each microbatch."""

    def __init__(self, module: Chunk) -> None:
        self.module = module
        self.queue = WeightGradients()
        accumulate_in_place(module, self.queue)
        self.inputs: dict[int, Tensors] = {}
        self.outputs: dict[int, list[GradientEdge | None]] = {}
        """Of each floating-point output; None where it depends on no parameter and no input."""
        self.gradients: dict[int, Tensors] = {}
        self.weights: dict[int, Callable[[], None]] = {}
        """Second halves of split backwards."""
        self.saved_bytes: int | None = None
        """Bytes that one microbatch keeps from its forward to its backward, once known."""

    @property
    def held(self) -> set[int]:
        return set().union(self.inputs, self.outputs, self.gradients, self.weights)


class PipelineExecutor:
    """Executes one batch after another on the stage of `rank`.

    `transport` may be None when there is one stage. `microbatch_size` counts rows. Raises `GridError` when chunks would
    send different messages over one edge.
    """

    def __init__(
        self,
        *,
        model: PipelineModel,
        chunks: Sequence[Chunk],
        layout: ChunkLayout,
        grid: ProcessGrid,
        rank: int,
        transport: Transport | None,
        microbatch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        spans: SpanRecorder | None,
    ) -> None:
        self._model = model
        self._chunks = [_ChunkState(chunk) for chunk in chunks]
        self._layout = layout
        self._grid = grid
        self._rank = rank
        self._stage = grid.coordinates(rank).inter
        self._transport = transport
        self._spans = spans
        self._microbatch_size = microbatch_size
        self._dtype = dtype
        self._device = device
        self._edges = {direction: self._edges_of(direction) for direction in Direction}
        self._announce()
        self._active_bytes = 0
        self.most_active_bytes = 0
        """Most bytes of activations that were kept for backwards at any one time so far."""

    @property
    def held(self) -> int:
        """(chunk, microbatch) pairs of which something is still held; zero between batches."""
        return sum(len(chunk.held) for chunk in self._chunks)

    def train(
        self,
        schedule: StageSchedule,
        inputs: torch.Tensor | None,
        targets: torch.Tensor | None,
        *,
        loss_scale: float,
    ) -> torch.Tensor | None:
        """Forward and backward of every microbatch; gradients of `loss_scale` x sum of microbatch losses accumulate.

        `inputs` [rows, ...] are used where the network begins, `targets` where it ends. Returns the sum of losses (a
        scalar without a graph, not scaled) where the network ends, None elsewhere.
        """
        batch = _Batch(inputs, targets, self._microbatch_size, loss_scale)
        self._expect(schedule.microbatches, *Direction)
        transport = self._transport
        while not schedule.done:
            if transport is not None:
                for message in transport.poll():
                    self._take(message, schedule)
            task = schedule.next_task()
            if task is None:
                self._wait(schedule)
                continue
            start = SpanRecorder.now()
            outgoing = self._run(task, batch)
            self._record(task, start)
            local = self._hand_on(task, outgoing)
            schedule.finished(task)
            if local is not None:
                schedule.arrived(*local)
        if transport is not None:
            transport.flush()
        return batch.loss()

    @torch.no_grad()
    def evaluate(
        self, microbatches: int, inputs: torch.Tensor | None, targets: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Forward only; no gradient and no parameter changes. Sum of microbatch losses where the network ends."""
        batch = _Batch(inputs, targets, self._microbatch_size, 1.0)
        transport = self._transport
        self._expect(microbatches, Direction.FORWARD)
        ready: deque[tuple[Address, Tensors]] = deque()
        source = self._layout.is_source(self._stage, 0)
        begun = 0
        for _ in range(microbatches * len(self._chunks)):
            if transport is not None:
                ready.extend(transport.poll())
            if not ready and source and begun < microbatches:
                ready.append((Address(Direction.FORWARD, 0, begun), batch.tokens(begun)))
                begun += 1
            if not ready:
                assert transport is not None, "a stage without others has its inputs"
                ready.extend(transport.wait())
            (_, chunk, microbatch), tensors = ready.popleft()
            output = self._chunks[chunk].module(*tensors)
            target = self._layout.target(self._stage, chunk, Direction.FORWARD)
            if target is None:
                batch.losses[microbatch] = self._model.loss(_unpacked(output), batch.labels(microbatch))
            elif target[0] == self._stage:
                ready.append((Address(Direction.FORWARD, target[1], microbatch), output))
            else:
                assert transport is not None
                # One message under way at a time: without backwards nothing else bounds what piles up downstream.
                transport.flush()
                self._send(target, Direction.FORWARD, microbatch, output)
        if transport is not None:
            transport.flush()
        return batch.loss()

    def _announce(self) -> None:
        """Tell the transport what will be sent, so that it refuses anything else."""
        if self._transport is None:
            return
        for direction in Direction:
            for chunk, state in enumerate(self._chunks):
                target = self._layout.target(self._stage, chunk, direction)
                if target is not None and target[0] != self._stage:
                    self._transport.announce(self._edge(target[0], state, direction, outwards=True))

    def _edge(self, stage: int, state: _ChunkState, direction: Direction, *, outwards: bool) -> Edge:
        span = state.module.span
        boundary = span.stop - 1 if outwards == (direction == Direction.FORWARD) else span.start - 1
        tensors = self._specs(boundary, direction)
        return Edge(peer=self._peer(stage), direction=direction, tensors=tensors, device=self._device)

    def _edges_of(self, direction: Direction) -> dict[Edge, int]:
        """Edges that bring messages of this direction to the stage, with how many chunks they serve."""
        edges: dict[int, tuple[Edge, int]] = {}
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
        specs = self._model.activation(boundary, self._microbatch_size, self._dtype)
        return tuple(s for s in specs if direction == Direction.FORWARD or s.dtype.is_floating_point)

    def _peer(self, stage: int) -> int:
        here = self._grid.coordinates(self._rank)
        return self._grid.rank(data=here.data, inter=stage, row=here.row, col=here.col)

    def _expect(self, microbatches: int, *directions: Direction) -> None:
        if self._transport is not None:
            for direction in directions:
                for edge, chunks in self._edges[direction].items():
                    self._transport.expect(edge, microbatches * chunks)

    def _take(self, message: Message, schedule: StageSchedule) -> None:
        self._put(message.address, message.tensors)
        schedule.arrived(*message.address)

    def _put(self, address: Address, tensors: Tensors) -> None:
        direction, chunk, microbatch = address
        state = self._chunks[chunk]
        if direction == Direction.FORWARD:
            state.inputs[microbatch] = tuple(t.requires_grad_(t.dtype.is_floating_point) for t in tensors)
        else:
            state.gradients[microbatch] = tensors

    def _wait(self, schedule: StageSchedule) -> None:
        assert self._transport is not None, "a schedule of one stage never waits"
        start = SpanRecorder.now()
        messages = self._transport.wait()
        if self._spans is not None:
            # Waiting ended with the first message; that one was waited for.
            direction, chunk, microbatch = messages[0].address
            self._spans.add(
                SpanKind.RECEIVE_WAIT,
                start,
                self._spans.now(),
                microbatch=microbatch,
                layer=self._chunks[chunk].module.span.start,
                direction=direction,
                chunk=chunk,
            )
        for message in messages:
            self._take(message, schedule)

    def _run(self, task: Task, batch: _Batch) -> Tensors:
        """Run a task; what it hands on (nothing where the network begins or ends, and from weight halves)."""
        kind, chunk, microbatch = task
        state = self._chunks[chunk]
        if kind == Kind.FORWARD:
            return self._forward(state, chunk, microbatch, batch)
        if kind == Kind.WEIGHT:
            state.weights.pop(microbatch)()
            outgoing: Tensors = ()
        else:
            state.queue.deferring = kind == Kind.INPUT
            outgoing = self._backward(state, chunk, microbatch, batch)
            if kind == Kind.INPUT:
                state.queue.deferring = False
                state.weights[microbatch] = state.queue.take()
        if kind != Kind.INPUT:
            self._active_bytes -= state.saved_bytes or 0
        return outgoing

    def _forward(self, state: _ChunkState, chunk: int, microbatch: int, batch: _Batch) -> Tensors:
        source = self._layout.is_source(self._stage, chunk)
        x = batch.tokens(microbatch) if source else state.inputs[microbatch]
        if state.saved_bytes is None:
            output = self._first_forward(state, x, microbatch, batch, chunk)
        else:
            output = self._compute(state, x, microbatch, batch, chunk)
        self._active_bytes += state.saved_bytes or 0
        self.most_active_bytes = max(self.most_active_bytes, self._active_bytes)
        # The graph is held, the output itself only as long as its message is under way.
        state.outputs[microbatch] = [
            get_gradient_edge(t) if t.requires_grad else None for t in output if t.dtype.is_floating_point
        ]
        if self._layout.is_sink(self._stage, chunk):
            return ()
        return tuple(t.detach().contiguous() for t in output)

    def _compute(self, state: _ChunkState, x: Tensors, microbatch: int, batch: _Batch, chunk: int) -> Tensors:
        output: Tensors = state.module(*x)
        if not self._layout.is_sink(self._stage, chunk):
            return output
        loss = self._model.loss(_unpacked(output), batch.labels(microbatch))
        batch.losses[microbatch] = loss.detach()
        return (loss,)

    def _first_forward(self, state: _ChunkState, x: Tensors, microbatch: int, batch: _Batch, chunk: int) -> Tensors:
        """The first forward of a chunk counts the bytes that each one keeps."""
        saved = SavedBytes(without=state.module.parameters())
        for tensor in x:
            saved.add(tensor)
        with saved.counting():
            output = self._compute(state, x, microbatch, batch, chunk)
        state.saved_bytes = saved.bytes
        return output

    def _backward(self, state: _ChunkState, chunk: int, microbatch: int, batch: _Batch) -> Tensors:
        outputs = state.outputs.pop(microbatch)
        if self._layout.is_sink(self._stage, chunk):
            gradients: Sequence[torch.Tensor] = [batch.loss_gradient(microbatch)]
        else:
            gradients = state.gradients.pop(microbatch)
        pairs = [(edge, g) for edge, g in zip(outputs, gradients, strict=True) if edge is not None]
        torch.autograd.backward([edge for edge, _ in pairs], [g for _, g in pairs])
        if self._layout.is_source(self._stage, chunk):
            return ()
        inputs = [t for t in state.inputs.pop(microbatch) if t.requires_grad]
        return tuple(torch.zeros_like(t) if t.grad is None else t.grad.contiguous() for t in inputs)

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

    def _record(self, task: Task, start: float) -> None:
        if self._spans is not None:
            self._spans.add(
                SpanKind(task.kind.label),
                start,
                self._spans.now(),
                microbatch=task.microbatch,
                layer=self._chunks[task.chunk].module.span.start,
                chunk=task.chunk,
            )


class _Batch:
    """A batch shard cut into microbatches, and the losses that have come of them."""

    def __init__(self, inputs: torch.Tensor | None, targets: torch.Tensor | None, rows: int, loss_scale: float) -> None:
        self._tokens = () if inputs is None else torch.split(inputs, rows)
        self._labels = () if targets is None else torch.split(targets, rows)
        self._loss_scale = loss_scale
        self.losses: dict[int, torch.Tensor] = {}

    def tokens(self, microbatch: int) -> Tensors:
        return (self._tokens[microbatch],)

    def labels(self, microbatch: int) -> torch.Tensor:
        return self._labels[microbatch]

    def loss_gradient(self, microbatch: int) -> torch.Tensor:
        return torch.full_like(self.losses[microbatch], self._loss_scale)

    def loss(self) -> torch.Tensor | None:
        """Sum of the losses in the order of the microbatches; None where none was computed."""
        return torch.stack([self.losses[m] for m in sorted(self.losses)]).sum() if self.losses else None


def _unpacked(output: Tensors) -> torch.Tensor | Tensors:
    return output[0] if len(output) == 1 else output
