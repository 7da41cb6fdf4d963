"""Messages between two ranks and collectives of all of them, by size, as our engine sends them; memory and copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch

from axonn.distributed.collectives import CollectiveGroup, Collectives
from axonn.distributed.tensor_spec import TensorSpec
from axonn.distributed.transport import Address, MessageEdge, Transport
from axonn.grid import AXES
from axonn.schedules import Direction
from experiments.calibration.timing import Phases, Timer

if TYPE_CHECKING:
    from mpi4py import MPI

_BEFORE_S = 3e-3
"""How long the receiver has waited when a message is sent: it sleeps between its looks, as it does in a run."""
_AFTER_S = 4e-3
"""How long the sender computes after it, beside what the message may take."""
_SLOWEST = 5e8
"""Bytes per second."""


def message_seconds(transport: Transport, comm: MPI.Intracomm, sizes: Sequence[int], *, repeats: int) -> list[float]:
    """From `send` to the end of `wait`, for messages of these sizes from rank 0, which computes on, to rank 1.

    Every rank calls it; the others stand by. Both clocks are that of the machine.
    """
    found = []
    for nbytes in sizes:
        spec = TensorSpec((nbytes // 4,), torch.float32)
        cpu = torch.device("cpu")
        if comm.rank == 1:
            transport.expect(MessageEdge(peer=0, direction=Direction.FORWARD, tensors=(spec,), device=cpu), repeats)
        times = []
        for number in range(repeats):
            payload = torch.ones(spec.shape)
            comm.Barrier()
            stamp = 0.0
            if comm.rank == 0:
                _compute(_BEFORE_S)
                stamp = time.perf_counter()
                transport.send(1, Address(Direction.FORWARD, 0, number), (payload,))
                _compute(_AFTER_S + nbytes / _SLOWEST)
                transport.flush()
            elif comm.rank == 1:
                while not transport.wait():
                    pass
                stamp = time.perf_counter()
            stamps = comm.allgather(stamp)
            times.append(stamps[1] - stamps[0])
        found.append(median(times[1:]))
    return found


def host_seconds(transport: Transport, comm: MPI.Intracomm, sizes: Sequence[int], *, repeats: int) -> list[float]:
    """Of each side of a message, by its size: by how much it delays what its sender, rank 0, or its receiver, rank 1,
    computes meanwhile. The others stand by."""
    found = []
    for nbytes in sizes:
        count = _products(_AFTER_S + nbytes / _SLOWEST)
        spec = TensorSpec((nbytes // 4,), torch.float32)
        if comm.rank == 1:
            cpu = torch.device("cpu")
            transport.expect(MessageEdge(peer=0, direction=Direction.FORWARD, tensors=(spec,), device=cpu), repeats)
        payload = torch.ones(spec.shape)
        alone, beside = [], []
        for number in range(repeats):
            comm.Barrier()
            alone.append(_elapsed(count))
            comm.Barrier()
            start = time.perf_counter()
            if comm.rank == 0:
                transport.send(1, Address(Direction.FORWARD, 0, number), (payload,))
            _elapsed(count)
            if comm.rank == 0:
                transport.flush()
            elif comm.rank == 1:
                while not transport.wait():
                    pass
            beside.append(time.perf_counter() - start)
        sides = comm.allgather(median(beside) - median(alone))[:2]
        found.append(max(1e-6, sum(sides) / 2))
    return found


def _products(seconds: float) -> int:
    """How many small matrix products take about so long."""
    count = 256
    return max(1, round(count * seconds / min(_elapsed(count) for _ in range(5))))


def _elapsed(count: int) -> float:
    """Seconds of so many small matrix products."""
    a = torch.ones(128, 128)
    start = time.perf_counter()
    for _ in range(count):
        a @ a
    return time.perf_counter() - start


def _compute(seconds: float) -> None:
    """What a stage does: matrix products, for about so long."""
    a = torch.ones(128, 128)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(4):
            a @ a


def all_reduce_seconds(collectives: Collectives, sizes: Sequence[int], timer: Timer) -> list[float]:
    """All-reduces over all ranks, of these numbers of bytes in float32, nobody computing meanwhile.

    Before each the ranks compute, as they do in a run, and so do not begin it at the same moment.
    """
    group = collectives.axis_group(AXES)
    before = partial(_elapsed, _products(_BEFORE_S))
    found = []
    for nbytes in sizes:
        reduce = partial(_all_reduce, collectives, group, torch.zeros(max(1, nbytes // 4)))

        def sample(reduce: Callable[[], object] = reduce) -> Phases:
            timer.together()
            return before, reduce

        found.append(timer.of(sample)[1])
    return found


def slowdown_beside(collectives: Collectives, timer: Timer, *, nbytes: int) -> float:
    """How much longer matrix products take while an all-reduce of `nbytes` is under way all the time."""
    group = collectives.axis_group(AXES)
    tensor = torch.zeros(nbytes // 4)
    alone = timer.agree(_once(partial(_all_reduce, collectives, group, tensor), timer))
    side = 128
    a = torch.ones(side, side)

    def products(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                a @ a

        return run

    one = timer.agree(_once(products(50), timer)) / 50
    # As much to compute as the collective takes: what is longer than both ends in their sum at the latest.
    count = max(1, round(alone / one))
    compute = timer.agree(_once(products(count), timer))

    def both() -> None:
        work = collectives.all_reduce(tensor, group)
        products(count)()
        work.wait()

    together = timer.agree(_once(both, timer))
    # Computing for C beside a collective of A takes C + A (1 - 1 / slowdown), see `axonn.perf.timing.task_times`.
    hidden = min(0.95, max(0.0, (together - compute) / alone))
    return 1 / (1 - hidden)


def _all_reduce(collectives: Collectives, group: CollectiveGroup, tensor: torch.Tensor) -> None:
    collectives.all_reduce(tensor, group).wait()


def _once(operation: Callable[[], object], timer: Timer) -> float:
    """Seconds of an operation that all ranks begin at once."""

    def sample() -> Phases:
        timer.together()
        return (operation,)

    return timer.of(sample)[0]


def copy_rate(timer: Timer, nbytes: int = 64 << 20) -> float:
    """Bytes per second that a copy reads, and writes once more."""
    source = torch.ones(nbytes // 4)
    target = torch.empty_like(source)
    return nbytes / _once(lambda: target.copy_(source), timer)


def host_link_rate(timer: Timer, device: torch.device, nbytes: int = 64 << 20) -> float:
    """Bytes per second of a copy from page-locked host memory to a GPU, or back: the slower of the two."""
    here = torch.empty(nbytes // 4, dtype=torch.float32, device=device)
    there = torch.empty(nbytes // 4, dtype=torch.float32, device="cpu", pin_memory=True)
    inwards = _once(lambda: here.copy_(there, non_blocking=True), timer)
    outwards = _once(lambda: there.copy_(here, non_blocking=True), timer)
    return nbytes / max(inwards, outwards)


def empty_kernel(timer: Timer) -> float:
    """Seconds of the least that a kernel can do."""
    x = torch.zeros(1)

    def run() -> None:
        for _ in range(200):
            x.add_(1.0)

    return _once(run, timer) / 200
