"""Ends of the channels of `axonn.distributed.transport.torch_distributed`, each with the thread that serves it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from axonn.distributed.transport.base import DECISION_BYTES, Address, Decision, Message, MessageEdge
from axonn.distributed.transport.message_header import (
    HEADER_BYTES,
    open_decision,
    open_header,
    pack_decision,
    pack_header,
)
from axonn.distributed.transport.torch_wire import Transfer, Wire
from axonn.errors import TransportError

_JOIN_S = 5.0


class ChannelState:
    """State shared by the threads of a transport."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """Lock that must be held to read or write anything here or in the ends."""
        self.failure: BaseException | None = None
        self.closing = False


class _Closed(Exception):
    """Raised in the threads of a transport when it is being closed, to end them."""


class ChannelEnd:
    """One end of a channel and the thread that serves it, started at its first use."""

    def __init__(self, state: ChannelState) -> None:
        self.state = state
        self.current: Transfer | None = None
        """Transfer that the thread waits for."""
        self._thread: threading.Thread | None = None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="axonn-channel", daemon=True)
            self._thread.start()

    def join(self) -> None:
        """Wait until its thread has ended."""
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _serve(self) -> None:
        try:
            while True:
                self._serve_one()
        except _Closed:
            return
        except BaseException as error:
            with self.state.changed:
                if not self.state.closing:
                    self.state.failure = self.state.failure or error
                self.state.changed.notify_all()

    def _serve_one(self) -> None:
        raise NotImplementedError

    def _until(self, ready: Callable[[], object]) -> None:
        """Sleep until `ready()`; the caller holds the lock."""
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


class Receiver(ChannelEnd):
    """Receiving end of a channel for messages; receives in order, as many as are expected."""

    def __init__(self, state: ChannelState, rank: int, control: Wire, wire: Wire) -> None:
        super().__init__(state)
        self._rank = rank
        self._control = control
        self._wire = wire
        self._edge: MessageEdge | None = None
        self.left = 0
        self.arrived: deque[Message] = deque()

    def expect(self, edge: MessageEdge, count: int) -> None:
        """Receive `count` messages over `edge`. Raises `TransportError` while earlier ones are still expected."""
        with self.state.changed:
            if self.left:
                raise TransportError(f"rank {self._rank} still expects messages from rank {edge.peer}")
            self._edge = edge
            self.left = count
            self.state.changed.notify_all()
        self._start()

    def take(self) -> list[Message]:
        """Return what has arrived since the last call; the caller holds the lock."""
        messages = list(self.arrived)
        self.arrived.clear()
        for message in messages:
            self._wire.hand_over(message.tensors)
        return messages

    def _serve_one(self) -> None:
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


class DecisionReceiver(ChannelEnd):
    """Receiving end of a channel for decisions; receives as many as are expected."""

    def __init__(self, state: ChannelState, wire: Wire) -> None:
        super().__init__(state)
        self._wire = wire
        self.left = 0
        self.arrived: list[Decision] = []

    def expect(self, count: int) -> None:
        """Receive `count` decisions."""
        with self.state.changed:
            self.left = count
            self.state.changed.notify_all()
        self._start()

    def take(self) -> list[Decision]:
        """Return what has arrived since the last call; the caller holds the lock."""
        decisions, self.arrived = self.arrived, []
        return decisions

    def _serve_one(self) -> None:
        with self.state.changed:
            self._until(lambda: self.left)
        packed = torch.empty(DECISION_BYTES, dtype=torch.uint8)
        self._finish(self._wire.receive([packed]))
        with self.state.changed:
            self.left -= 1
            self.arrived.append(open_decision(bytearray(packed.numpy())))
            self.state.changed.notify_all()


@dataclass
class _Outgoing:
    """A send under way, with the memory that must stay alive until it has left."""

    memory: tuple[torch.Tensor, ...]
    transfers: tuple[Transfer, ...]
    left: Callable[[], None]


class Outbox(ChannelEnd):
    """Sending end of a channel: sends start on the caller's thread, and its own thread drops those that have left."""

    def __init__(self, state: ChannelState) -> None:
        super().__init__(state)
        self.queue: deque[_Outgoing] = deque()

    def _post(self, out: _Outgoing) -> None:
        with self.state.changed:
            self.queue.append(out)
            self.state.changed.notify_all()
        self._start()

    def _serve_one(self) -> None:
        with self.state.changed:
            self._until(lambda: self.queue)
            out = self.queue[0]
        for transfer in out.transfers:
            self._finish(transfer)
        out.left()
        with self.state.changed:
            self.queue.popleft()
            self.state.changed.notify_all()


class Sender(Outbox):
    """Sending end of a channel for messages; `sent` is called with address and start of each that has left."""

    def __init__(self, state: ChannelState, control: Wire, wire: Wire, sent: Callable[[Address, float], None]) -> None:
        super().__init__(state)
        self._control = control
        self._wire = wire
        self._sent = sent

    def send(self, address: Address, tensors: tuple[torch.Tensor, ...]) -> None:
        """Post a message; returns before it has left."""
        start = time.perf_counter()
        header = torch.frombuffer(pack_header(address, tensors), dtype=torch.uint8)
        transfers = (self._control.send([header]), self._wire.send(tensors))
        self._post(_Outgoing((header, *tensors), transfers, partial(self._sent, address, start)))


class DecisionSender(Outbox):
    """Sending end of a channel for decisions."""

    def __init__(self, state: ChannelState, wire: Wire) -> None:
        super().__init__(state)
        self._wire = wire

    def send(self, decision: Decision) -> None:
        """Post a decision; returns before it has left."""
        packed = torch.frombuffer(pack_decision(decision), dtype=torch.uint8)
        self._post(_Outgoing((packed,), (self._wire.send([packed]),), lambda: None))
