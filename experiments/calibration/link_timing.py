"""Timing of messages between two ranks and collectives over all, by size, as the engine sends them; and of copies."""

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
"""Time for which the receiver has waited when a message is sent: it sleeps between polls, as it does in a run."""
_AFTER_S = 4e-3
"""Time for which the sender computes after it, in addition to the time that the message may take."""
_SLOWEST = 5e8
"""Lowest rate of messages that is allowed for, bytes per second."""


def message_seconds(transport: Transport, comm: MPI.Intracomm, sizes: Sequence[int], *, repeats: int) -> list[float]:
    """Return the seconds from `send` to the end of `wait`, for messages of these sizes from rank 0, which goes on
    computing, to rank 1.

    Every rank calls it; the others stand by. Both ranks read the machine's clock.
    """
    medians = []
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
        medians.append(median(times[1:]))
    return medians


def host_seconds(transport: Transport, comm: MPI.Intracomm, sizes: Sequence[int], *, repeats: int) -> list[float]:
    """Return the seconds by which a message of each size delays the computation of its sender, rank 0, or of its
    receiver, rank 1: their mean. The other ranks stand by."""
    delays = []
    for nbytes in sizes:
        count = _products(_AFTER_S + nbytes / _SLOWEST)
        spec = TensorSpec((nbytes // 4,), torch.float32)
        if comm.rank == 1:
            cpu = torch.device("cpu")
            transport.expect(MessageEdge(peer=0, direction=Direction.FORWARD, tensors=(spec,), device=cpu), repeats)
        payload = torch.ones(spec.shape)
        alone, with_message = [], []
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
            with_message.append(time.perf_counter() - start)
        sides = comm.allgather(median(with_message) - median(alone))[:2]
        delays.append(max(1e-6, sum(sides) / 2))
    return delays


def _products(seconds: float) -> int:
    """Return how many small matrix products take about so many seconds."""
    count = 256
    return max(1, round(count * seconds / min(_elapsed(count) for _ in range(5))))


def _elapsed(count: int) -> float:
    """Return the seconds of so many small matrix products."""
    a = torch.ones(128, 128)
    start = time.perf_counter()
    for _ in range(count):
        a @ a
    return time.perf_counter() - start


def _compute(seconds: float) -> None:
    """Compute matrix products, as a stage does, for about so many seconds."""
    a = torch.ones(128, 128)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(4):
            a @ a


def all_reduce_seconds(collectives: Collectives, sizes: Sequence[int], timer: Timer) -> list[float]:
    """Return the seconds of all-reduces over all ranks, by bytes of float32, while no rank computes.

    Before each the ranks compute, as they do in a run, and so do not begin it at the same moment.
    """
    group = collectives.axis_group(AXES)
    before = partial(_elapsed, _products(_BEFORE_S))
    medians = []
    for nbytes in sizes:
        reduce = partial(_all_reduce, collectives, group, torch.zeros(max(1, nbytes // 4)))

        def sample(reduce: Callable[[], object] = reduce) -> Phases:
            timer.barrier()
            return before, reduce

        medians.append(timer.of(sample)[1])
    return medians


def slowdown_beside(collectives: Collectives, timer: Timer, *, nbytes: int) -> float:
    """Return the slowdown of matrix products while an all-reduce of `nbytes` is under way all the time."""
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
    # As much to compute as the collective takes, so that both together take at most their sum.
    count = max(1, round(alone / one))
    compute = timer.agree(_once(products(count), timer))

    def both() -> None:
        work = collectives.all_reduce(tensor, group)
        products(count)()
        work.wait()

    overlapped = timer.agree(_once(both, timer))
    # Computing for C beside a collective of A takes C + A (1 - 1 / slowdown), see `axonn.perf.timing.task_times`.
    hidden = min(0.95, max(0.0, (overlapped - compute) / alone))
    return 1 / (1 - hidden)


def _all_reduce(collectives: Collectives, group: CollectiveGroup, tensor: torch.Tensor) -> None:
    collectives.all_reduce(tensor, group).wait()


def _once(operation: Callable[[], object], timer: Timer) -> float:
    """Return the seconds of an operation that all ranks begin at once."""

    def sample() -> Phases:
        timer.barrier()
        return (operation,)

    return timer.of(sample)[0]


def copy_rate(timer: Timer, nbytes: int = 64 << 20) -> float:
    """Return the bytes per second that a copy reads; it writes as many."""
    source = torch.ones(nbytes // 4)
    target = torch.empty_like(source)
    return nbytes / _once(lambda: target.copy_(source), timer)


def host_link_rate(timer: Timer, device: torch.device, nbytes: int = 64 << 20) -> float:
    """Return the bytes per second of a copy from page-locked host memory to a GPU or back: the slower of the two."""
    on_device = torch.empty(nbytes // 4, dtype=torch.float32, device=device)
    on_host = torch.empty(nbytes // 4, dtype=torch.float32, device="cpu", pin_memory=True)
    to_device = _once(lambda: on_device.copy_(on_host, non_blocking=True), timer)
    to_host = _once(lambda: on_host.copy_(on_device, non_blocking=True), timer)
    return nbytes / max(to_device, to_host)


def empty_kernel(timer: Timer) -> float:
    """Return the seconds of the smallest possible kernel."""
    x = torch.zeros(1)

    def run() -> None:
        for _ in range(200):
            x.add_(1.0)

    return _once(run, timer) / 200
