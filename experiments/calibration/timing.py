"""Timing of operations as inside of a training step: each is timed after other operations, on other memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

_POOL_BYTES = 32 << 20
_LONG_S = 20e-3
_FEWEST = 3

Phases = Sequence[Callable[[], object]]


class Pool:
    """Memory from which operands are taken in turn, so that each was last used some operations ago.

    In a training step, too, the operands of an operation have left the caches of their core and lie in a shared cache
    or in memory: weights since the last microbatch, activations since the forward.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory = torch.randn(_POOL_BYTES // dtype.itemsize, dtype=dtype)
        self._next = 0
        self.dtype = dtype
        self.device = self._memory.device

    def take(self, *shape: int) -> torch.Tensor:
        """Return a contiguous tensor in memory that was last used long before; a large one in new memory."""
        size = prod(shape)
        if size > self._memory.numel() // 2:
            return torch.randn(shape, dtype=self.dtype)
        if self._next + size > self._memory.numel():
            self._next = 0
        start, self._next = self._next, self._next + -(-size // 64) * 64
        return self._memory[start : start + size].view(shape)


class Clock:
    """Clock for work of a CPU, which is done when the call returns."""

    def start(self) -> None:
        """Start a measurement."""
        self._start = time.perf_counter()

    def stop(self) -> Callable[[], float]:
        """Stop the measurement; return a function that gives the seconds since `start` once they are known."""
        seconds = time.perf_counter() - self._start
        return lambda: seconds


class DeviceClock(Clock):
    """Clock for work of a GPU, between two events of its stream. The host does not wait in between.

    Timed work must be queued while the device is still busy with other work, so that it never waits for the host:
    `Busy` takes care of that.
    """

    def start(self) -> None:
        self._begin = self._event()

    def stop(self) -> Callable[[], float]:
        begin, end = self._begin, self._event()

        def seconds() -> float:
            end.synchronize()
            return 1e-3 * float(begin.elapsed_time(end))

        return seconds

    @staticmethod
    def _event() -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream())
        return event


class Busy:
    """Work for a GPU of about a millisecond: a product whose operands are larger than its caches."""

    def __init__(self, dtype: torch.dtype, size: int = 8192) -> None:
        self._a, self._b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
        self._out = torch.empty_like(self._a)

    @torch.no_grad()
    def __call__(self) -> None:
        torch.mm(self._a, self._b, out=self._out)


@dataclass(frozen=True)
class Timer:
    """Timer of samples of an operation, whose median counts.

    `samples`: their number, after one that is thrown away; fewer for long operations. `between` runs before each, and
    `barrier` before the first: it lets several ranks begin at once. `agree` reduces the numbers of all ranks to one.
    """

    barrier: Callable[[], None] = field(default=lambda: None)
    agree: Callable[[float], float] = field(default=lambda seconds: seconds)
    between: Callable[[], object] = field(default=lambda: None)
    samples: int = 7
    clock: Clock = field(default_factory=Clock)

    def of(self, sample: Callable[[], Phases]) -> list[float]:
        """Return the seconds of each phase of a sample; `sample` prepares one and returns its phases, which run in
        order."""
        samples: list[list[float]] = []
        count = self.samples + 1
        kept: list[object] = []
        self.barrier()
        while len(samples) < count:
            kept.clear()
            readings = []
            for phase in sample():
                self.between()
                self.clock.start()
                # Results of operations stay alive, as they do in a step.
                kept.append(phase())
                readings.append(self.clock.stop())
            times = [seconds() for seconds in readings]
            samples.append(times)
            # All ranks take the same number of samples.
            if len(samples) == 1 and self.agree(sum(times)) > _LONG_S:
                count = min(count, _FEWEST + 1)
        return [median(column) for column in zip(*samples[1:], strict=True)]


@dataclass(frozen=True)
class Bench:
    """Pool and timer of a measurement. `backward_call`: seconds of a backward in which nothing is computed."""

    pool: Pool
    timer: Timer
    backward_call: float = 0.0

    @classmethod
    def of(cls, dtype: torch.dtype, timer: Timer) -> Bench:
        """Return a bench with `timer`, between whose samples other operations run, as they do in a step."""
        pool = Pool(dtype)
        others = _Others(pool) if pool.device.type == "cpu" else Busy(dtype)
        disturbed = replace(timer, between=others)
        bench = cls(pool, disturbed)
        empty = differentiated(lambda x: x.view_as(x), lambda: (pool.take(1),), bench)[1]
        return cls(pool, disturbed, empty)


class _Others:
    """Small operations of a step, which evict the measured operation's operands from the core's caches."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._weight = torch.randn(128, 128, dtype=pool.dtype)
        self._kernel = torch.randn(16, 16, 3, 3, dtype=pool.dtype)

    @torch.no_grad()
    def __call__(self) -> None:
        take = self._pool.take
        x = F.layer_norm(take(64, 128), (128,))
        x = F.gelu(F.linear(x, self._weight)) + x
        heads = x.view(1, 64, 4, 32).transpose(1, 2)
        x = torch.cat(
            [F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2), take(1, 64, 128)]
        )
        image = F.silu(F.group_norm(take(4, 16, 8, 8), 4))
        F.conv2d(image, self._kernel, padding=1)
        torch.softmax(x, -1).sum()
        torch.add(take(1 << 16), 1.0)


def differentiated(
    forward: Callable[..., torch.Tensor],
    arguments: Callable[[], tuple[torch.Tensor, ...]],
    bench: Bench,
    *,
    shared: Sequence[torch.Tensor] = (),
) -> tuple[float, float]:
    """Return (forward, backward) seconds of a function of tensors.

    `arguments` returns the tensors of one operation, which get gradients, as do the `shared` parameters, which follow
    them.
    """

    def sample() -> Phases:
        inputs = [t.detach().requires_grad_() for t in arguments()]
        outputs: list[torch.Tensor] = []

        def run() -> None:
            outputs.append(forward(*inputs, *shared))

        def back() -> object:
            (y,) = outputs
            return torch.autograd.grad(y, [*inputs, *shared], output_gradient(y))

        return run, back

    def output_gradient(y: torch.Tensor) -> torch.Tensor:
        return bench.pool.take(*y.shape) if y.dim() else torch.ones_like(y)

    seconds = bench.timer.of(sample)
    # A step has one call for all of its operations.
    return seconds[0], max(0.2 * seconds[1], seconds[1] - bench.backward_call)
