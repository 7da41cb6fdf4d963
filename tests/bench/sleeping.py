"""Compute that is a timed sleep, and messages that take a given time: schedules on more ranks than there are cores.

Ranks that sleep do not need a core, so 8 of them show on 2 cores what 8 busy ones would show on 8. Executor, schedules
and messages are the real ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from axonn.distributed.tensor_spec import TensorSpec
from axonn.distributed.transport import Address, Decision, Message, MessageEdge, Transport
from axonn.grid import ProcessGrid
from axonn.models.base import Layer
from axonn.models.initialization import Constant, Initial
from axonn.schedules import ChunkLayout, Kind, Task
from axonn.tensor import TensorContext
from axonn.tensor.gradient_accumulation import WeightGradients
from tests.bench.jitter import draw

_STAMP = TensorSpec((1,), torch.float64)
_LONGEST_SLEEP_S = 5e-4


@dataclass(frozen=True)
class Compute:
    """Seconds of every task: forward and the two halves of the backward take `forward` on a whole stage, and up to
    twice `jitter` more."""

    forward: float
    layout: ChunkLayout
    jitter: float
    seed: int = 1

    def __call__(self, stage: int, task: Task) -> float:
        if task.kind == Kind.BACKWARD:
            # Whole or split, a backward takes as long.
            halves = (task._replace(kind=kind) for kind in (Kind.INPUT, Kind.WEIGHT))
            return sum(self(stage, half) for half in halves)
        more = 2 * self.jitter * draw(self.seed, stage, task)
        return self.forward / self.layout.chunks * (1 + more)


class SleepLayer(nn.Module):
    """One chunk. The tensor that passes through it is the number of the microbatch."""

    def __init__(self, stage: int, chunk: int, compute: Compute, context: TensorContext) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))
        self.weight_gradients = WeightGradients()
        self._stage, self._chunk, self._compute = stage, chunk, compute

    def sleep(self, kind: Kind, microbatch: int) -> None:
        time.sleep(self._compute(self._stage, Task(kind, self._chunk, microbatch)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sleep(Kind.FORWARD, int(x))
        y: torch.Tensor = _Sleep.apply(x, self.weight, self)  # type: ignore[no-untyped-call]
        return y


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, layer: SleepLayer) -> torch.Tensor:
        ctx.layer, ctx.microbatch = layer, int(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        layer, microbatch = ctx.layer, ctx.microbatch
        layer.sleep(Kind.INPUT, microbatch)

        def second_half() -> None:
            layer.sleep(Kind.WEIGHT, microbatch)
            layer.weight.grad = torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad

        layer.weight_gradients.add(second_half)
        return (gradient if ctx.needs_input_grad[0] else None), None, None


class SleepModel:
    """A `PipelineModel` with one `SleepLayer` per virtual stage. A microbatch is one row: its number."""

    def __init__(self, layout: ChunkLayout, compute: Compute) -> None:
        self.layers: Sequence[Layer] = [
            Layer(name=f"sleep{v}", build=partial(SleepLayer, *layout.place(v), compute), cost=1.0)
            for v in range(layout.virtual_stages)
        ]
        self.ties: Sequence[tuple[str, str]] = ()

    def check(self, grid: ProcessGrid) -> None:
        return None

    def initial(self, name: str) -> Initial:
        return Constant(0.0)

    def activation(
        self, layer: int, microbatch_size: int, dtype: torch.dtype, context: TensorContext
    ) -> tuple[TensorSpec, ...]:
        return (TensorSpec((microbatch_size, 1), dtype),)

    def loss(self, output: torch.Tensor, targets: torch.Tensor, context: TensorContext) -> torch.Tensor:
        return output.mean()


class DelayedTransport(Transport):
    """Hands a message over `latency` seconds after it was sent, or when it has really arrived if that is later.

    Each message carries the time at which it was sent, so all ranks must be on one machine.
    """

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner.rank)
        self.latency = 0.0
        self.waited_for: list[float] = []
        """Seconds from send to hand-over of messages that found their receiver waiting."""
        self._inner = inner
        self._pending: list[tuple[float, Message]] = []
        """By the time at which each was sent; those of one edge stay in order, since the latency is one."""

    def expect(self, edge: MessageEdge, count: int) -> None:
        self._inner.expect(replace(edge, tensors=(*edge.tensors, _STAMP)), count)

    def _send(self, peer: int, address: Address, tensors: tuple[torch.Tensor, ...]) -> None:
        stamp = torch.tensor([time.perf_counter()], dtype=torch.float64)
        self._inner.send(peer, address, (*tensors, stamp))

    def expect_decisions(self, peer: int, count: int) -> None:
        self._inner.expect_decisions(peer, count)

    def _send_decision(self, peer: int, decision: Decision) -> None:
        self._inner.send_decision(peer, decision)

    def poll_decisions(self) -> list[Decision]:
        return self._inner.poll_decisions()

    def poll(self) -> list[Message]:
        self._take(self._inner.poll())
        return self._due()

    def wait(self) -> list[Message]:
        if not self._pending:
            self._take(self._inner.wait())
        while not (due := self.poll()):
            left = self._pending[0][0] + self.latency - time.perf_counter()
            time.sleep(min(max(left, 0.0), _LONGEST_SLEEP_S))
        # The first was waited for.
        self.waited_for.append(time.perf_counter() - self._last_sent)
        return due

    def flush(self) -> None:
        self._inner.flush()

    def _take(self, messages: Sequence[Message]) -> None:
        for address, tensors in messages:
            *own, stamp = tensors
            self._pending.append((float(stamp), Message(address, tuple(own))))
        self._pending.sort(key=lambda entry: entry[0])

    def _due(self) -> list[Message]:
        now = time.perf_counter()
        count = sum(sent + self.latency <= now for sent, _ in self._pending)
        if count:
            self._last_sent = self._pending[0][0]
        due = [message for _, message in self._pending[:count]]
        del self._pending[:count]
        return due
