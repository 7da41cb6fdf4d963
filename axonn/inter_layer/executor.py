"""Runs the tasks of one stage as its schedule asks for them, with messages to and from the neighbouring stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from axonn.grid import ProcessGrid
from axonn.inter_layer.stage import Stage
from axonn.models.base import PipelineModel
from axonn.schedules import Direction, Kind, StageSchedule, Task
from axonn.trace import SpanKind, SpanRecorder
from axonn.transport import Address, Edge, Message, Transport

_SPAN_OF = {Kind.FORWARD: SpanKind.FORWARD, Kind.BACKWARD: SpanKind.BACKWARD}


class PipelineExecutor:
    """Executes one batch after another on the stage of `rank`.

    `transport` may be None when there is one stage. `microbatch_size` counts rows.
    """

    def __init__(
        self,
        *,
        model: PipelineModel,
        stage: Stage,
        grid: ProcessGrid,
        rank: int,
        transport: Transport | None,
        microbatch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        spans: SpanRecorder | None,
    ) -> None:
        self._model = model
        self._stage = stage
        self._transport = transport
        self._spans = spans
        self._microbatch_size = microbatch_size
        self._layer = stage.span.start
        shape = model.activation_shape(microbatch_size)

        def edge(step: int, direction: Direction) -> Edge | None:
            peer = grid.neighbour(rank, step)
            if peer is None:
                return None
            return Edge(peer=peer, direction=direction, shape=shape, dtype=dtype, device=device)

        self._before = edge(-1, Direction.FORWARD)
        self._after = edge(+1, Direction.BACKWARD)
        self._inputs: dict[int, torch.Tensor] = {}
        self._outputs: dict[int, GradientEdge] = {}
        self._gradients: dict[int, torch.Tensor] = {}

    @property
    def held(self) -> int:
        """Microbatches whose tensors are still held; zero between batches."""
        return len(self._inputs.keys() | self._outputs.keys() | self._gradients.keys())

    def train(
        self,
        schedule: StageSchedule,
        inputs: torch.Tensor | None,
        targets: torch.Tensor | None,
        *,
        loss_scale: float,
    ) -> torch.Tensor | None:
        """Forward and backward of every microbatch; gradients of `loss_scale` x sum of microbatch losses accumulate.

        `inputs` [rows, ...] are used on the first stage, `targets` on the last. Returns the scaled sum of losses (a
        scalar that carries no graph) on the last stage, None elsewhere.
        """
        tokens = None if inputs is None else torch.split(inputs, self._microbatch_size)
        labels = None if targets is None else torch.split(targets, self._microbatch_size)
        self._expect(schedule.microbatches, backward=True)
        losses: list[torch.Tensor] = []
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
            if task.kind == Kind.FORWARD:
                outgoing = self._forward(task.microbatch, tokens, labels, losses, loss_scale)
            else:
                outgoing = self._backward(task.microbatch, losses)
            self._record(task, start)
            if outgoing is not None:
                self._send(task, outgoing)
            schedule.finished(task)
        if transport is not None:
            transport.flush()
        if not losses:
            return None
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(
        self, microbatches: int, inputs: torch.Tensor | None, targets: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Forward only; no gradient and no parameter changes. Sum of microbatch losses on the last stage."""
        tokens = None if inputs is None else torch.split(inputs, self._microbatch_size)
        labels = None if targets is None else torch.split(targets, self._microbatch_size)
        self._expect(microbatches, backward=False)
        losses: list[torch.Tensor] = []
        arrived: list[Message] = []
        for microbatch in range(microbatches):
            if tokens is not None and self._before is None:
                x = tokens[microbatch]
            else:
                assert self._transport is not None
                arrived = arrived or self._transport.wait()
                x = arrived.pop(0).tensor
            output = self._stage(x)
            if self._after is None:
                assert labels is not None
                losses.append(self._model.loss(output, labels[microbatch]))
            else:
                assert self._transport is not None
                # One message under way at a time: without backwards nothing else bounds what piles up downstream.
                self._transport.flush()
                self._transport.send(self._after.peer, Address(Direction.FORWARD, 0, microbatch), output.contiguous())
        if self._transport is not None:
            self._transport.flush()
        return torch.stack(losses).sum() if losses else None

    def _expect(self, microbatches: int, *, backward: bool) -> None:
        if self._transport is None:
            return
        if self._before is not None:
            self._transport.expect(self._before, microbatches)
        if self._after is not None and backward:
            self._transport.expect(self._after, microbatches)

    def _take(self, message: Message, schedule: StageSchedule) -> None:
        direction, chunk, microbatch, _ = message.address
        if direction == Direction.FORWARD:
            self._inputs[microbatch] = message.tensor.requires_grad_()
        else:
            self._gradients[microbatch] = message.tensor
        schedule.arrived(direction, chunk, microbatch)

    def _wait(self, schedule: StageSchedule) -> None:
        assert self._transport is not None, "a schedule of one stage never waits"
        start = SpanRecorder.now()
        messages = self._transport.wait()
        if self._spans is not None:
            # Waiting ended with the first message; that one was waited for.
            first = messages[0].address
            self._spans.add(
                SpanKind.RECEIVE_WAIT,
                start,
                self._spans.now(),
                microbatch=first.microbatch,
                layer=self._layer,
                direction=first.direction,
            )
        for message in messages:
            self._take(message, schedule)

    def _forward(
        self,
        microbatch: int,
        tokens: Sequence[torch.Tensor] | None,
        labels: Sequence[torch.Tensor] | None,
        losses: list[torch.Tensor],
        loss_scale: float,
    ) -> torch.Tensor | None:
        if self._before is None:
            assert tokens is not None, "the first stage needs the inputs"
            x = tokens[microbatch]
        else:
            x = self._inputs[microbatch]
        output: torch.Tensor = self._stage(x)
        if self._after is None:
            assert labels is not None, "the last stage needs the targets"
            output = self._model.loss(output, labels[microbatch]) * loss_scale
            losses.append(output.detach())
            self._outputs[microbatch] = get_gradient_edge(output)
            return None
        # The graph is held, the output itself only as long as its message is under way.
        self._outputs[microbatch] = get_gradient_edge(output)
        return output.detach().contiguous()

    def _backward(self, microbatch: int, losses: list[torch.Tensor]) -> torch.Tensor | None:
        output = self._outputs.pop(microbatch)
        gradient = torch.ones_like(losses[0]) if self._after is None else self._gradients.pop(microbatch)
        torch.autograd.backward([output], [gradient])
        if self._before is None:
            return None
        x = self._inputs.pop(microbatch)
        assert x.grad is not None
        return x.grad.contiguous()

    def _send(self, task: Task, tensor: torch.Tensor) -> None:
        assert self._transport is not None
        if task.kind == Kind.FORWARD:
            assert self._after is not None
            peer, direction = self._after.peer, Direction.FORWARD
        else:
            assert self._before is not None
            peer, direction = self._before.peer, Direction.BACKWARD
        self._transport.send(peer, Address(direction, task.chunk, task.microbatch), tensor)

    def _record(self, task: Task, start: float) -> None:
        if self._spans is not None:
            self._spans.add(
                _SPAN_OF[task.kind], start, self._spans.now(), microbatch=task.microbatch, layer=self._layer
            )
