"""Messages over point-to-point operations of `torch.distributed`.

NCCL has no tags and runs the operations of a communicator one after the other, so every channel (from one rank to
another, in one direction) has a group of two ranks for itself. Headers travel over Gloo, and tensors behind them over
Gloo or NCCL. A thread per incoming channel receives, and one per outgoing channel waits for what was sent, because
Gloo tells only a waiting thread that an operation is complete. Tensors are received as soon as their header has
come: so none lands in memory of the wrong size, and no NCCL kernel spins on a GPU for a message not yet sent.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from axonn.errors import TransportError
from axonn.grid import ProcessGrid
from axonn.schedules import Direction
from axonn.transport.base import Address, Edge, Message, Transport
from axonn.transport.header import HEADER_BYTES, open_header, pack_header
from axonn.transport.torch_wire import GlooWire, NcclWire, Transfer, Wire

_JOIN_S = 5.0


class Channel(NamedTuple):
    """A way for messages of one direction from one rank to another."""

    source: int
    target: int
    direction: Direction


def channels_of(grid: ProcessGrid) -> list[Channel]:
    """All channels between neighbouring stages, last and first included, as chunks in loops or in a V need them."""
    found: dict[Channel, None] = {}
    for first in grid.group(0, [axis for axis in grid.order if axis != "inter"]):
        pipeline = grid.group(first, ["inter"])
        for here, following in zip(pipeline, (*pipeline[1:], pipeline[0]), strict=True):
            for source, target in ((here, following), (following, here)):
                if source != target:
                    found.update(dict.fromkeys(Channel(source, target, direction) for direction in Direction))
    return list(found)


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
        self._state = _State()
        self._incoming: dict[tuple[int, Direction], _Receiver] = {}
        self._outgoing: dict[tuple[int, Direction], _Sender] = {}
        for channel in channels_of(grid) if channels is None else channels:
            if rank not in channel[:2]:
                continue
            end = int(rank == channel.target)
            name = "-".join(map(str, channel))
            headers: Wire = GlooWire(PrefixStore(f"headers-{name}", store), end, timeout=timeout)
            wire = headers
            if here.type == "cuda":
                wire = NcclWire(PrefixStore(f"tensors-{name}", store), end, timeout=timeout, device=here)
            if rank == channel.target:
                self._incoming[channel.source, channel.direction] = _Receiver(self._state, rank, headers, wire)
            else:
                sent = partial(self._sent, channel.target)
                self._outgoing[channel.target, channel.direction] = _Sender(self._state, headers, wire, sent)

    def expect(self, edge: Edge, count: int) -> None:
        self._check_device(edge.device)
        receiver = self._incoming.get((edge.peer, edge.direction))
        if receiver is None:
            raise TransportError(f"rank {self.rank} has no {edge.direction.name.lower()} channel from {edge.peer}")
        receiver.expect(edge, count)

    def _send(self, peer: int, address: Address, tensors: tuple[torch.Tensor, ...]) -> None:
        sender = self._outgoing.get((peer, address.direction))
        if sender is None:
            raise TransportError(f"rank {self.rank} has no {address.direction.name.lower()} channel to {peer}")
        self._raise_failure()
        try:
            sender.send(address, tensors)
        except RuntimeError as error:
            raise TransportError(f"rank {self.rank}: rank {peer} cannot be reached: {error}") from error

    def poll(self) -> list[Message]:
        self._raise_failure()
        with self._state.changed:
            arrived = [message for receiver in self._incoming.values() for message in receiver.take()]
        return arrived

    def wait(self) -> list[Message]:
        state = self._state
        receivers = self._incoming.values()
        with state.changed:
            state.changed.wait_for(
                lambda: state.failure or any(r.arrived for r in receivers) or not any(r.left for r in receivers)
            )
        arrived = self.poll()
        if not arrived:
            raise TransportError(f"rank {self.rank} waits for a message, but none is expected")
        return arrived

    def flush(self) -> None:
        state = self._state
        with state.changed:
            state.changed.wait_for(lambda: state.failure or not any(s.queue for s in self._outgoing.values()))
        self._raise_failure()

    def close(self) -> None:
        ends = [*self._incoming.values(), *self._outgoing.values()]
        with self._state.changed:
            self._state.closing = True
            under_way = [end.current for end in ends if end.current is not None]
            self._state.changed.notify_all()
        for transfer in under_way:
            transfer.abort()
        for end in ends:
            end.join()
        # The connections end with the last reference, and peers that still wait for this rank learn of it.
        self._incoming.clear()
        self._outgoing.clear()

    def _raise_failure(self) -> None:
        failure = self._state.failure
        if isinstance(failure, TransportError):
            raise failure
        if failure is not None:
            raise TransportError(f"rank {self.rank}: torch.distributed failed: {failure}") from failure


class _State:
    """What the threads of a transport share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """Held to read or write anything here or in the ends."""
        self.failure: BaseException | None = None
        self.closing = False


class _Closed(Exception):
    """The transport is being closed; its threads end."""


class _End:
    """One end of a channel and the thread that serves it, started at its first use."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self.current: Transfer | None = None
        """What the thread waits for."""
        self._thread: threading.Thread | None = None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="axonn-channel", daemon=True)
            self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _serve(self) -> None:
        try:
            while True:
                self._once()
        except _Closed:
            return
        except BaseException as error:
            with self.state.changed:
                if not self.state.closing:
                    self.state.failure = self.state.failure or error
                self.state.changed.notify_all()

    def _once(self) -> None:
        raise NotImplementedError

    def _until(self, ready: Callable[[], object]) -> None:
        """Sleep until `ready`; the caller holds the lock."""
        self.state.changed.wait_for(lambda: self.state.closing or ready())
        if self.state.closing:
            raise _Closed

    def _finish(self, transfer: Transfer) -> None:
        with self.state.changed:
            if self.state.closing:
                raise _Closed
            self.current = transfer
        transfer.wait()
        with self.state.changed:
            self.current = None


class _Receiver(_End):
    """Receives the messages of a channel in order, as many as are expected."""

    def __init__(self, state: _State, rank: int, control: Wire, wire: Wire) -> None:
        super().__init__(state)
        self._rank = rank
        self._control = control
        self._wire = wire
        self._edge: Edge | None = None
        self.left = 0
        self.arrived: deque[Message] = deque()

    def expect(self, edge: Edge, count: int) -> None:
        with self.state.changed:
            if self.left:
                raise TransportError(f"rank {self._rank} still expects messages from rank {edge.peer}")
            self._edge = edge
            self.left = count
            self.state.changed.notify_all()
        self._start()

    def take(self) -> list[Message]:
        """What has arrived; the caller holds the lock."""
        messages = list(self.arrived)
        self.arrived.clear()
        for message in messages:
            self._wire.hand_over(message.tensors)
        return messages

    def _once(self) -> None:
        with self.state.changed:
            self._until(lambda: self.left)
            edge = self._edge
        assert edge is not None
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        self._finish(self._control.receive([header]))
        address = open_header(bytearray(header.numpy()), edge, rank=self._rank)
        buffers = self._wire.buffers(edge.tensors)
        self._finish(self._wire.receive(buffers))
        with self.state.changed:
            self.left -= 1
            self.arrived.append(Message(address, buffers))
            self.state.changed.notify_all()


@dataclass
class _Outgoing:
    """A message under way, with the memory that must stay until it has left."""

    address: Address
    header: torch.Tensor
    tensors: tuple[torch.Tensor, ...]
    transfers: tuple[Transfer, ...]
    start: float


class _Sender(_End):
    """Starts to send at once, on the caller's thread; its own thread drops what has left."""

    def __init__(self, state: _State, control: Wire, wire: Wire, sent: Callable[[Address, float], None]) -> None:
        super().__init__(state)
        self._control = control
        self._wire = wire
        self._sent = sent
        self.queue: deque[_Outgoing] = deque()

    def send(self, address: Address, tensors: tuple[torch.Tensor, ...]) -> None:
        start = time.perf_counter()
        header = torch.frombuffer(pack_header(address, tensors), dtype=torch.uint8)
        transfers = (self._control.send([header]), self._wire.send(tensors))
        with self.state.changed:
            self.queue.append(_Outgoing(address, header, tensors, transfers, start))
            self.state.changed.notify_all()
        self._start()

    def _once(self) -> None:
        with self.state.changed:
            self._until(lambda: self.queue)
            out = self.queue[0]
        for transfer in out.transfers:
            self._finish(transfer)
        self._sent(out.address, out.start)
        with self.state.changed:
            self.queue.popleft()
            self.state.changed.notify_all()
