"""Messages between stages. The engine does not know which implementation carries them."""

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
    """What a message is: with two stages previous and next are the same peer, so the peer alone does not say it.

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
"""What one rank of a stage has decided, for the others: three numbers, whose meaning is the caller's."""


class SentMessage(NamedTuple):
    """One message as this rank sent it. `bytes`: of its tensors, which have so many `elements`."""

    peer: int
    direction: Direction
    elements: int
    bytes: int


@dataclass
class Decisions:
    """How many decisions a rank has told others, counted once for each that it told, and their bytes."""

    messages: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class MessageEdge:
    """Where messages of one direction come from, and which tensors each of them carries."""

    peer: int
    direction: Direction
    tensors: tuple[TensorSpec, ...]
    device: torch.device


DECISION_BYTES = 24
"""Size of a decision under way."""


def describe(specs: Iterable[TensorSpec]) -> str:
    """`specs` in words: float32[4,10,24] int64[4]."""
    return " ".join(map(str, specs)) or "no tensors"


def mismatch(address: Address, way: str, found: str, expected: str) -> TransportError:
    """The error for a message whose tensors are not those of its edge."""
    direction, chunk, microbatch = address
    return TransportError(
        f"the {direction.name.lower()} message of chunk {chunk}, microbatch {microbatch} {way} carries {found}, "
        f"but {expected} is expected; every microbatch must have the shapes and types that its edge was given"
    )


class Transport(ABC):
    """Non-blocking point-to-point messages, delivered per edge and direction in send order.

    Beside them travel decisions, which have a way of their own: they neither overtake nor wait for the messages between
    the same two ranks, and come in the order in which they were told.

    A transport owns its progress: a message sent before a long computation has arrived when that ends, and so has a
    decision.
    """

    def __init__(self, rank: int, *, device: torch.device | None = None) -> None:
        self.rank = rank
        self.device = device
        """Where tensors lie; None if anywhere."""
        self.spans: SpanRecorder | None = None
        """Where send spans go, from the posting of a message until its buffer is free again."""
        self.calls: Counter[SentMessage] = Counter()
        """How often each message has been sent from here so far."""
        self.decisions = Decisions()
        """The traffic of `tell`."""
        self._announced: dict[tuple[int, Direction], tuple[TensorSpec, ...]] = {}

    def announce(self, edge: MessageEdge) -> None:
        """From now on `send` refuses what is not `edge.tensors` in `edge.direction` to `edge.peer`.

        Without it such a message is refused where it arrives.
        """
        self._announced[edge.peer, edge.direction] = edge.tensors

    def send(self, peer: int, address: Address, tensors: tuple[torch.Tensor, ...]) -> None:
        """Start sending contiguous `tensors` as one message; they must not be written until it has left.

        Raises `TransportError` for tensors that were not announced so.
        """
        way = f"from rank {self.rank} to rank {peer}"
        expected = self._announced.get((peer, address.direction))
        found = tuple(TensorSpec(tuple(t.shape), t.dtype) for t in tensors)
        if expected is not None and found != expected:
            raise mismatch(address, way, describe(found), describe(expected))
        if not all(t.is_contiguous() for t in tensors):
            raise mismatch(address, way, "tensors that are not contiguous", "contiguous memory")
        for tensor in tensors:
            self._check_device(tensor.device)
        self._send(peer, address, tensors)
        elements = sum(t.numel() for t in tensors)
        self.calls[SentMessage(peer, address.direction, elements, sum(t.nbytes for t in tensors))] += 1

    def tell(self, peer: int, decision: Decision) -> None:
        """Start sending `decision`. There is no answer: `peer` learns it from `told`, whatever it computes now."""
        self._tell(peer, decision)
        self.decisions.messages += 1
        self.decisions.bytes += DECISION_BYTES

    @abstractmethod
    def expect(self, edge: MessageEdge, count: int) -> None:
        """Receive `count` messages over `edge`; a receive stays posted until all have arrived.

        A message of other tensors than the edge's makes `poll` and `wait` raise `TransportError`.
        """

    @abstractmethod
    def _send(self, peer: int, address: Address, tensors: tuple[torch.Tensor, ...]) -> None: ...

    @abstractmethod
    def expect_decisions(self, peer: int, count: int) -> None:
        """Receive `count` decisions from `peer`, the only rank that tells this one any until all of them are here."""

    @abstractmethod
    def _tell(self, peer: int, decision: Decision) -> None: ...

    @abstractmethod
    def told(self) -> list[Decision]:
        """Decisions that have arrived since the last call, without waiting."""

    @abstractmethod
    def poll(self) -> list[Message]:
        """Messages that have arrived since the last call, without waiting."""

    @abstractmethod
    def wait(self) -> list[Message]:
        """As `poll`, but waits for at least one message, or for a decision that `told` has not returned yet.

        Raises `TransportError` when neither can come.
        """

    @abstractmethod
    def flush(self) -> None:
        """Wait until every message and every decision from here has left."""

    def close(self) -> None:
        """Release threads and communicators. A closed transport is not used again."""
        return None

    def _check_device(self, device: torch.device) -> None:
        if self.device is not None and device.type != self.device.type:
            raise TransportError(
                f"rank {self.rank}: a message with tensors on '{device}', but this transport was made for "
                f"'{self.device}'; connect with the device that the engine computes on"
            )

    def _nothing_expected(self) -> TransportError:
        return TransportError(f"rank {self.rank} waits for a message, but none is expected")

    def _still_told(self, peer: int) -> TransportError:
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
