"""The interface of transports, which carry messages between stages. The engine does not know the implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from axonn.distributed.tensor_spec import TensorSpec
from axonn.errors import TransportError
from axonn.schedules import Direction
from axonn.spans import SpanKind, SpanRecorder


class Address(NamedTuple):
    """Identity of a message. The peer alone does not identify it: with two stages, previous and next are the same peer.

    `chunk` is the receiver's.
    """

    direction: Direction
    chunk: int
    microbatch: int


class Message(NamedTuple):
    """An arrived message; the receiver owns `tensors`."""

    address: Address
    tensors: tuple[torch.Tensor, ...]


Decision = tuple[int, int, int]
"""A decision of one rank of a stage for the others: three numbers, whose meaning is up to the caller."""


class SentMessage(NamedTuple):
    """One message as this rank sent it: `elements` and `bytes` of its tensors."""

    peer: int
    direction: Direction
    elements: int
    bytes: int


@dataclass
class Decisions:
    """Decisions that a rank has sent, counted once per receiver, and their bytes."""

    messages: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class MessageEdge:
    """The messages of one direction between this rank and `peer`: the tensors that each of them carries."""

    peer: int
    direction: Direction
    tensors: tuple[TensorSpec, ...]
    device: torch.device


DECISION_BYTES = 24
"""Bytes of a decision on the wire."""


def describe(specs: Iterable[TensorSpec]) -> str:
    """Return `specs` as text: "float32[4,10,24] int64[4]"."""
    return " ".join(map(str, specs)) or "no tensors"


def mismatch(address: Address, route: str, actual: str, expected: str) -> TransportError:
    """Return the error for a message over `route` whose tensors are not those of its edge."""
    direction, chunk, microbatch = address
    return TransportError(
        f"the {direction.name.lower()} message of chunk {chunk}, microbatch {microbatch} {route} carries {actual}, "
        f"but {expected} is expected; every microbatch must have the shapes and types that its edge was given"
    )


class Transport(ABC):
    """Non-blocking point-to-point messages, delivered per edge and direction in send order.

    Decisions travel on a separate channel: they arrive in the order in which they were sent, independently of the
    messages between the same two ranks.

    A transport makes progress by itself: a message or decision sent before a long computation has arrived when the
    computation ends.
    """

    def __init__(self, rank: int, *, device: torch.device | None = None) -> None:
        self.rank = rank
        self.device = device
        """Device of the tensors; None if any."""
        self.spans: SpanRecorder | None = None
        """Recorder of send spans, each from the posting of a message until its buffer is free again."""
        self.calls: Counter[SentMessage] = Counter()
        """Messages that this rank has sent so far, with how often."""
        self.decisions = Decisions()
        """Traffic of `send_decision`."""
        self._announced: dict[tuple[int, Direction], tuple[TensorSpec, ...]] = {}

    def announce(self, edge: MessageEdge) -> None:
        """Make `send` refuse messages in `edge.direction` to `edge.peer` with tensors other than `edge.tensors`.

        Without it such a message is refused by the receiver.
        """
        self._announced[edge.peer, edge.direction] = edge.tensors

    def send(self, peer: int, address: Address, tensors: tuple[torch.Tensor, ...]) -> None:
        """Start sending contiguous `tensors` as one message; they must not be written until it has left.

        Raises `TransportError` for tensors that are not contiguous, on another device, or not as announced.
        """
        route = f"from rank {self.rank} to rank {peer}"
        expected = self._announced.get((peer, address.direction))
        actual = tuple(TensorSpec(tuple(t.shape), t.dtype) for t in tensors)
        if expected is not None and actual != expected:
            raise mismatch(address, route, describe(actual), describe(expected))
        if not all(t.is_contiguous() for t in tensors):
            raise mismatch(address, route, "tensors that are not contiguous", "contiguous memory")
        for tensor in tensors:
            self._check_device(tensor.device)
        self._send(peer, address, tensors)
        elements = sum(t.numel() for t in tensors)
        self.calls[SentMessage(peer, address.direction, elements, sum(t.nbytes for t in tensors))] += 1

    def send_decision(self, peer: int, decision: Decision) -> None:
        """Start sending `decision`, which `peer` gets from `poll_decisions`; there is no reply."""
        self._send_decision(peer, decision)
        self.decisions.messages += 1
        self.decisions.bytes += DECISION_BYTES

    @abstractmethod
    def expect(self, edge: MessageEdge, count: int) -> None:
        """Receive `count` messages over `edge`; a receive stays posted until all have arrived.

        A message with other tensors than the edge's makes `poll` and `wait` raise `TransportError`.
        """

    @abstractmethod
    def _send(self, peer: int, address: Address, tensors: tuple[torch.Tensor, ...]) -> None: ...

    @abstractmethod
    def expect_decisions(self, peer: int, count: int) -> None:
        """Receive `count` decisions from `peer`, the only rank that sends this one any until all have arrived."""

    @abstractmethod
    def _send_decision(self, peer: int, decision: Decision) -> None: ...

    @abstractmethod
    def poll_decisions(self) -> list[Decision]:
        """Return the decisions that have arrived since the last call, without waiting."""

    @abstractmethod
    def poll(self) -> list[Message]:
        """Return the messages that have arrived since the last call, without waiting."""

    @abstractmethod
    def wait(self) -> list[Message]:
        """Wait for a message, or for a decision that `poll_decisions` has not returned; return messages as `poll`.

        Raises `TransportError` when neither is expected.
        """

    @abstractmethod
    def flush(self) -> None:
        """Wait until every message and every decision of this rank has left."""

    def close(self) -> None:
        """Release threads and communicators. A closed transport must not be used again."""
        return None

    def _check_device(self, device: torch.device) -> None:
        if self.device is not None and device.type != self.device.type:
            raise TransportError(
                f"rank {self.rank}: a message with tensors on '{device}', but this transport was made for "
                f"'{self.device}'; connect with the device that the engine computes on"
            )

    def _nothing_expected(self) -> TransportError:
        return TransportError(f"rank {self.rank} waits for a message, but none is expected")

    def _still_expected(self, peer: int) -> TransportError:
        return TransportError(f"rank {self.rank} still expects decisions from rank {peer}")

    def _sent(self, peer: int, address: Address, start: float) -> None:
        if self.spans is not None:
            self.spans.add(
                SpanKind.SEND,
                start,
                self.spans.now(),
                microbatch=address.microbatch,
                direction=address.direction,
                chunk=address.chunk,
                peer=peer,
            )
