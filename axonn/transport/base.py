"""Messages between stages. The engine does not know which implementation carries them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch

from axonn.schedules import Direction
from axonn.trace import SpanKind, SpanRecorder


class Address(NamedTuple):
    """What a message is: with two stages previous and next are the same peer, so the peer alone does not say it."""

    direction: Direction
    chunk: int
    microbatch: int
    tensor: int = 0


class Message(NamedTuple):
    """An arrived message; the receiver owns `tensor`."""

    address: Address
    tensor: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Edge:
    """Where messages of one direction come from, and what each of them looks like."""

    peer: int
    direction: Direction
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Transport(ABC):
    """Non-blocking point-to-point messages, delivered per edge and direction in send order.

    A transport owns its progress: a message sent before a long computation has arrived when that ends.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.spans: SpanRecorder | None = None
        """Where send spans go, from the posting of a message until its buffer is free again."""

    @abstractmethod
    def expect(self, edge: Edge, count: int) -> None:
        """Receive `count` messages over `edge`; a receive stays posted until all have arrived."""

    @abstractmethod
    def send(self, peer: int, address: Address, tensor: torch.Tensor) -> None:
        """Start sending a contiguous `tensor`, which must not be written until it has left."""

    @abstractmethod
    def poll(self) -> list[Message]:
        """Messages that have arrived since the last call, without waiting."""

    @abstractmethod
    def wait(self) -> list[Message]:
        """As `poll`, but waits for at least one message. Raises `TransportError` when none can come."""

    @abstractmethod
    def flush(self) -> None:
        """Wait until every message sent from here has left."""

    def close(self) -> None:
        """Release threads and communicators. A closed transport is not used again."""
        return None

    def _sent(self, address: Address, start: float) -> None:
        if self.spans is not None:
            self.spans.add(
                SpanKind.SEND,
                start,
                self.spans.now(),
                microbatch=address.microbatch,
                direction=address.direction,
            )
