"""The ends of the channels of `axonn.distributed.transport.torch_distributed`, each with the thread that serves it."""

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


class State:
    """What the threads of a transport share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """Held to read or write anything here or in the ends."""
        self.failure: BaseException | None = None
        self.closing = False


class _Closed(Exception):
    """The transport is being closed; its threads end."""


class End:
    """One end of a channel and the thread that serves it, started at its first use."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.current: Transfer | None = None
        """What the thread waits for."""
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


class Receiver(End):
    """Receives the messages of a channel in order, as many as are expected."""

    def __init__(self, state: State, rank: int, control: Wire, wire: Wire) -> None:
        super().__init__(state)
        self._rank = rank
        self._control = control
        self._wire = wire
        self._edge: MessageEdge | None = None
        self.left = 0
        self.arrived: deque[Message] = deque()

    def expect(self, edge: MessageEdge, count: int) -> None:
        """Receive `count` messages over `edge`. Raises `TransportError` while earlier ones are to come."""
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


class Hearer(End):
    """Receives decisions, as many as are expected."""

    def __init__(self, state: State, wire: Wire) -> None:
        super().__init__(state)
        self._wire = wire
        self.left = 0
        self.told: list[Decision] = []

    def expect(self, count: int) -> None:
        """Receive `count` decisions."""
        with self.state.changed:
            self.left = count
            self.state.changed.notify_all()
        self._start()

    def take(self) -> list[Decision]:
        """What has arrived; the caller holds the lock."""
        told, self.told = self.told, []
        return told

    def _once(self) -> None:
        with self.state.changed:
            self._until(lambda: self.left)
        packed = torch.empty(DECISION_BYTES, dtype=torch.uint8)
        self._finish(self._wire.receive([packed]))
        with self.state.changed:
            self.left -= 1
            self.told.append(open_decision(bytearray(packed.numpy())))
            self.state.changed.notify_all()


@dataclass
class _Outgoing:
    """What is under way, with the memory that must stay until it has left."""

    memory: tuple[torch.Tensor, ...]
    transfers: tuple[Transfer, ...]
    left: Callable[[], None]


class Outbox(End):
    """Starts to send at once, on the caller's thread; its own thread drops what has left."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.queue: deque[_Outgoing] = deque()

    def _post(self, out: _Outgoing) -> None:
        with self.state.changed:
            self.queue.append(out)
            self.state.changed.notify_all()
        self._start()

    def _once(self) -> None:
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
    """Sends messages; `sent` is called with the address and the start of each that has left."""

    def __init__(self, state: State, control: Wire, wire: Wire, sent: Callable[[Address, float], None]) -> None:
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


class Teller(Outbox):
    """Sends decisions."""

    def __init__(self, state: State, wire: Wire) -> None:
        super().__init__(state)
        self._wire = wire

    def tell(self, decision: Decision) -> None:
        """Post a decision; returns before it has left."""
        packed = torch.frombuffer(pack_decision(decision), dtype=torch.uint8)
        self._post(_Outgoing((packed,), (self._wire.send([packed]),), lambda: None))
