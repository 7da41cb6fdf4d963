"""The head of a message (what it is and which tensors follow) and a decision, each in a fixed number of bytes."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

import torch

from axonn.distributed.tensor_spec import TensorSpec
from axonn.distributed.transport.base import Address, Decision, MessageEdge, describe, mismatch
from axonn.schedules import Direction

HEADER_BYTES = 512
_NUMBERS = struct.Struct("<qqq")
_TEXT_BYTES = HEADER_BYTES - _NUMBERS.size


def _fitted(specs: Iterable[TensorSpec]) -> str:
    """The description of `specs`; one that is too long is cut and ends with its own hash."""
    text = describe(specs)
    if len(text) <= _TEXT_BYTES:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return f"{text[: _TEXT_BYTES - 36]}... {digest}"


def pack_header(address: Address, tensors: Iterable[torch.Tensor]) -> bytearray:
    """The `HEADER_BYTES` bytes that go before `tensors`."""
    text = _fitted(TensorSpec(tuple(t.shape), t.dtype) for t in tensors)
    return bytearray(_NUMBERS.pack(*address) + text.encode().ljust(_TEXT_BYTES, b"\0"))


def open_header(header: bytearray, edge: MessageEdge, *, rank: int) -> Address:
    """The address in a header that came to `rank` over `edge`. Raises `TransportError` for tensors of other specs."""
    direction, chunk, microbatch = _NUMBERS.unpack_from(header)
    address = Address(Direction(direction), chunk, microbatch)
    found = header[_NUMBERS.size :].rstrip(b"\0").decode()
    expected = _fitted(edge.tensors)
    if found != expected:
        raise mismatch(address, f"from rank {edge.peer} to rank {rank}", found, expected)
    return address


def pack_decision(decision: Decision) -> bytearray:
    """The `DECISION_BYTES` bytes of a decision."""
    return bytearray(_NUMBERS.pack(*decision))


def open_decision(packed: bytearray) -> Decision:
    """Inverse of `pack_decision`."""
    first, second, third = _NUMBERS.unpack(packed)
    return first, second, third
