"""Transport over point-to-point operations of `torch.distributed`.

NCCL has no tags and runs the operations of a communicator one after the other, so every channel (from one rank to
another, in one direction or for decisions) has a group of two ranks of its own. Headers and decisions travel over Gloo,
tensors behind their headers over Gloo or NCCL. Each incoming channel has a thread that receives, and each outgoing
channel one that waits for its sends, because Gloo reports completion only to a waiting thread. Tensors are received as
soon as their header has arrived: so none is written to memory of the wrong size, and no NCCL kernel spins on a GPU for
a message that has not been sent.
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
from axonn.distributed.transport.torch_ends import (
    ChannelEnd,
    ChannelState,
    DecisionReceiver,
    DecisionSender,
    Outbox,
    Receiver,
    Sender,
)
from axonn.distributed.transport.torch_wire import GlooWire, NcclWire, Wire
from axonn.errors import TransportError
from axonn.grid import TENSOR_AXES, ProcessGrid
from axonn.schedules import Direction


class Channel(NamedTuple):
    """A channel from one rank to another, for messages of one direction or for decisions (None)."""

    source: int
    target: int
    direction: Direction | None


def channels_of(grid: ProcessGrid) -> list[Channel]:
    """Return all channels of the grid: those between neighbouring stages and those inside each stage."""
    return _between_stages(grid) + _inside_stages(grid)


def _between_stages(grid: ProcessGrid) -> list[Channel]:
    """Return the channels for messages. Last and first stage are neighbours too, for chunks in loops or in a V."""
    channels: dict[Channel, None] = {}
    for first in grid.group(0, [axis for axis in grid.order if axis != "inter"]):
        pipeline = grid.group(first, ["inter"])
        for rank, following in zip(pipeline, (*pipeline[1:], pipeline[0]), strict=True):
            for source, target in ((rank, following), (following, rank)):
                if source != target:
                    channels.update(dict.fromkeys(Channel(source, target, direction) for direction in Direction))
    return list(channels)


def _inside_stages(grid: ProcessGrid) -> list[Channel]:
    """Return the channels for decisions, from the first rank of each stage to the others."""
    if grid.inter == 1:
        return []
    return [Channel(stage[0], member, None) for stage in grid.groups(TENSOR_AXES) for member in stage[1:]]


class TorchTransport(Transport):
    """Transport over `channels` (by default those of the grid), the same in the same order on every rank.

    Made by all ranks, which find each other over `store`, whose keys nothing else uses. Tensors travel over Gloo in
    host memory, or over NCCL if `device` is a GPU. Waiting for longer than `timeout` is an error.
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
        device = device or torch.device("cpu")
        super().__init__(rank, device=device)
        if device.type == "cuda" and not dist.is_nccl_available():
            raise TransportError(f"messages of GPU tensors need NCCL, which torch {torch.__version__} lacks; use MPI")
        self._state = ChannelState()
        self._incoming: dict[tuple[int, Direction], Receiver] = {}
        self._outgoing: dict[tuple[int, Direction], Sender] = {}
        self._decision_receivers: dict[int, DecisionReceiver] = {}
        self._decision_senders: dict[int, DecisionSender] = {}
        for channel in channels_of(grid) if channels is None else channels:
            if rank not in channel[:2]:
                continue
            end = int(rank == channel.target)
            name = "-".join(map(str, channel))
            headers: Wire = GlooWire(PrefixStore(f"headers-{name}", store), end, timeout=timeout)
            if channel.direction is None:
                if rank == channel.target:
                    self._decision_receivers[channel.source] = DecisionReceiver(self._state, headers)
                else:
                    self._decision_senders[channel.target] = DecisionSender(self._state, headers)
                continue
            wire = headers
            if device.type == "cuda":
                wire = NcclWire(PrefixStore(f"tensors-{name}", store), end, timeout=timeout, device=device)
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
        receiver = self._decision_receivers.get(peer)
        if receiver is None:
            raise TransportError(f"rank {self.rank} has no channel for decisions from {peer}")
        if any(r.left for r in self._decision_receivers.values()):
            raise self._still_expected(peer)
        receiver.expect(count)

    def _send_decision(self, peer: int, decision: Decision) -> None:
        sender = self._decision_senders.get(peer)
        if sender is None:
            raise TransportError(f"rank {self.rank} has no channel for decisions to {peer}")
        self._start(peer, lambda: sender.send(decision))

    def poll_decisions(self) -> list[Decision]:
        self._raise_failure()
        with self._state.changed:
            return [decision for receiver in self._decision_receivers.values() for decision in receiver.take()]

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
        receivers, decision_receivers = self._incoming.values(), self._decision_receivers.values()

        def expected() -> bool:
            return any(r.left for r in receivers) or any(d.left for d in decision_receivers)

        def decisions_arrived() -> bool:
            return any(d.arrived for d in decision_receivers)

        with state.changed:
            state.changed.wait_for(
                lambda: state.failure or any(r.arrived for r in receivers) or decisions_arrived() or not expected()
            )
        arrived = self.poll()
        if not arrived and not decisions_arrived():
            raise self._nothing_expected()
        return arrived

    def flush(self) -> None:
        state = self._state
        with state.changed:
            state.changed.wait_for(lambda: state.failure or not any(box.queue for box in self._outboxes()))
        self._raise_failure()

    def close(self) -> None:
        ends: list[ChannelEnd] = [*self._incoming.values(), *self._decision_receivers.values(), *self._outboxes()]
        with self._state.changed:
            self._state.closing = True
            under_way = [end.current for end in ends if end.current is not None]
            self._state.changed.notify_all()
        for transfer in under_way:
            transfer.abort()
        for end in ends:
            end.join()
        # The connections end with the last reference, and peers that still wait for this rank learn of it.
        for ends_of in (self._incoming, self._outgoing, self._decision_receivers, self._decision_senders):
            ends_of.clear()

    def _outboxes(self) -> list[Outbox]:
        return [*self._outgoing.values(), *self._decision_senders.values()]

    def _raise_failure(self) -> None:
        failure = self._state.failure
        if isinstance(failure, TransportError):
            raise failure
        if failure is not None:
            raise TransportError(f"rank {self.rank}: torch.distributed failed: {failure}") from failure
