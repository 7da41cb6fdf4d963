"""Messages over point-to-point operations of `torch.distributed`.

NCCL has no tags and runs the operations of a communicator one after the other, so every channel (from one rank to
another, in one direction or for decisions) has a group of two ranks for itself. Headers and decisions travel over Gloo,
and tensors behind their headers over Gloo or NCCL. A thread per incoming channel receives, and one per outgoing channel
waits for what was sent, because Gloo tells only a waiting thread that an operation is complete. Tensors are received as
soon as their header has come: so none lands in memory of the wrong size, and no NCCL kernel spins on a GPU for a
message not yet sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from axonn.distributed.transport.base import Address, Decision, Message, MessageEdge, Transport
from axonn.distributed.transport.torch_ends import End, Hearer, Outbox, Receiver, Sender, State, Teller
from axonn.distributed.transport.torch_wire import GlooWire, NcclWire, Wire
from axonn.errors import TransportError
from axonn.grid import TENSOR_AXES, ProcessGrid
from axonn.schedules import Direction


class Channel(NamedTuple):
    """A way for messages of one direction, or for decisions (None), from one rank to another."""

    source: int
    target: int
    direction: Direction | None


def channels_of(grid: ProcessGrid) -> list[Channel]:
    """All channels that the grid needs: those between neighbouring stages, and those inside of each stage."""
    return _between_stages(grid) + _inside_stages(grid)


def _between_stages(grid: ProcessGrid) -> list[Channel]:
    """For messages; last and first stage are neighbours too, as chunks in loops or in a V need it."""
    found: dict[Channel, None] = {}
    for first in grid.group(0, [axis for axis in grid.order if axis != "inter"]):
        pipeline = grid.group(first, ["inter"])
        for here, following in zip(pipeline, (*pipeline[1:], pipeline[0]), strict=True):
            for source, target in ((here, following), (following, here)):
                if source != target:
                    found.update(dict.fromkeys(Channel(source, target, direction) for direction in Direction))
    return list(found)


def _inside_stages(grid: ProcessGrid) -> list[Channel]:
    """For decisions, from the first rank of each stage to the others."""
    if grid.inter == 1:
        return []
    return [Channel(stage[0], member, None) for stage in grid.groups(TENSOR_AXES) for member in stage[1:]]


class TorchTransport(Transport):
    """Point-to-point over `channels` (by default those of the grid), the same in the same order on every rank.

    Collective over the ranks, which find each other over `store`; nothing else uses its keys. Tensors travel over Gloo
    from host memory, and over NCCL when `device` is a GPU. What is awaited for longer than `timeout` is an error.
    """

    def __init__(
        self,
        grid: ProcessGrid,
        rank: int,
        *,
        store: Store,
        channels: Sequence[Channel] | None = None,
        device: torch.device | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        here = device or torch.device("cpu")
        super().__init__(rank, device=here)
        if here.type == "cuda" and not dist.is_nccl_available():
            raise TransportError(f"messages of GPU tensors need NCCL, which torch {torch.__version__} lacks; use MPI")
        self._state = State()
        self._incoming: dict[tuple[int, Direction], Receiver] = {}
        self._outgoing: dict[tuple[int, Direction], Sender] = {}
        self._hearers: dict[int, Hearer] = {}
        self._tellers: dict[int, Teller] = {}
        for channel in channels_of(grid) if channels is None else channels:
            if rank not in channel[:2]:
                continue
            end = int(rank == channel.target)
            name = "-".join(map(str, channel))
            headers: Wire = GlooWire(PrefixStore(f"headers-{name}", store), end, timeout=timeout)
            if channel.direction is None:
                if rank == channel.target:
                    self._hearers[channel.source] = Hearer(self._state, headers)
                else:
                    self._tellers[channel.target] = Teller(self._state, headers)
                continue
            wire = headers
            if here.type == "cuda":
                wire = NcclWire(PrefixStore(f"tensors-{name}", store), end, timeout=timeout, device=here)
            if rank == channel.target:
                self._incoming[channel.source, channel.direction] = Receiver(self._state, rank, headers, wire)
            else:
                sent = partial(self._sent, channel.target)
                self._outgoing[channel.target, channel.direction] = Sender(self._state, headers, wire, sent)

    def expect(self, edge: MessageEdge, count: int) -> None:
        self._check_device(edge.device)
        receiver = self._incoming.get((edge.peer, edge.direction))
        if receiver is None:
            raise TransportError(f"rank {self.rank} has no {edge.direction.name.lower()} channel from {edge.peer}")
        receiver.expect(edge, count)

    def expect_decisions(self, peer: int, count: int) -> None:
        hearer = self._hearers.get(peer)
        if hearer is None:
            raise TransportError(f"rank {self.rank} has no channel for decisions from {peer}")
        if any(other.left for other in self._hearers.values()):
            raise self._still_told(peer)
        hearer.expect(count)

    def _tell(self, peer: int, decision: Decision) -> None:
        teller = self._tellers.get(peer)
        if teller is None:
            raise TransportError(f"rank {self.rank} has no channel for decisions to {peer}")
        self._start(peer, lambda: teller.tell(decision))

    def told(self) -> list[Decision]:
        self._raise_failure()
        with self._state.changed:
            return [decision for hearer in self._hearers.values() for decision in hearer.take()]

    def _send(self, peer: int, address: Address, tensors: tuple[torch.Tensor, ...]) -> None:
        sender = self._outgoing.get((peer, address.direction))
        if sender is None:
            raise TransportError(f"rank {self.rank} has no {address.direction.name.lower()} channel to {peer}")
        self._start(peer, lambda: sender.send(address, tensors))

    def _start(self, peer: int, start: Callable[[], None]) -> None:
        self._raise_failure()
        try:
            start()
        except RuntimeError as error:
            raise TransportError(f"rank {self.rank}: rank {peer} cannot be reached: {error}") from error

    def poll(self) -> list[Message]:
        self._raise_failure()
        with self._state.changed:
            arrived = [message for receiver in self._incoming.values() for message in receiver.take()]
        return arrived

    def wait(self) -> list[Message]:
        state = self._state
        receivers, hearers = self._incoming.values(), self._hearers.values()

        def expected() -> bool:
            return any(r.left for r in receivers) or any(h.left for h in hearers)

        def told() -> bool:
            return any(h.told for h in hearers)

        with state.changed:
            state.changed.wait_for(
                lambda: state.failure or any(r.arrived for r in receivers) or told() or not expected()
            )
        arrived = self.poll()
        if not arrived and not told():
            raise self._nothing_expected()
        return arrived

    def flush(self) -> None:
        state = self._state
        with state.changed:
            state.changed.wait_for(lambda: state.failure or not any(box.queue for box in self._outboxes()))
        self._raise_failure()

    def close(self) -> None:
        ends: list[End] = [*self._incoming.values(), *self._hearers.values(), *self._outboxes()]
        with self._state.changed:
            self._state.closing = True
            under_way = [end.current for end in ends if end.current is not None]
            self._state.changed.notify_all()
        for transfer in under_way:
            transfer.abort()
        for end in ends:
            end.join()
        # The connections end with the last reference, and peers that still wait for this rank learn of it.
        for ends_of in (self._incoming, self._outgoing, self._hearers, self._tellers):
            ends_of.clear()

    def _outboxes(self) -> list[Outbox]:
        return [*self._outgoing.values(), *self._tellers.values()]

    def _raise_failure(self) -> None:
        failure = self._state.failure
        if isinstance(failure, TransportError):
            raise failure
        if failure is not None:
            raise TransportError(f"rank {self.rank}: torch.distributed failed: {failure}") from failure
