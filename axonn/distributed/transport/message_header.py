"""Wire format of message headers (the address and the tensors that follow) and decisions, of fixed sizes."""

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
    """Return the description of `specs`; one that is too long is truncated and ends with its hash."""
    text = describe(specs)
    if len(text) <= _TEXT_BYTES:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return f"{text[: _TEXT_BYTES - 36]}... {digest}"


def pack_header(address: Address, tensors: Iterable[torch.Tensor]) -> bytearray:
    """Return the header of `HEADER_BYTES` bytes that is sent before `tensors`."""
    text = _fitted(TensorSpec(tuple(t.shape), t.dtype) for t in tensors)
    return bytearray(_NUMBERS.pack(*address) + text.encode().ljust(_TEXT_BYTES, b"\0"))


def open_header(header: bytearray, edge: MessageEdge, *, rank: int) -> Address:
    """Return the address in a header that `rank` received over `edge`. Raises `TransportError` for other tensors."""
    direction, chunk, microbatch = _NUMBERS.unpack_from(header)
    address = Address(Direction(direction), chunk, microbatch)
    actual = header[_NUMBERS.size :].rstrip(b"\0").decode()
    expected = _fitted(edge.tensors)
    if actual != expected:
        raise mismatch(address, f"from rank {edge.peer} to rank {rank}", actual, expected)
    return address


def pack_decision(decision: Decision) -> bytearray:
    """Return the `DECISION_BYTES` bytes of a decision."""
    return bytearray(_NUMBERS.pack(*decision))


def open_decision(packed: bytearray) -> Decision:
    """Return the decision that `pack_decision` packed."""
    first, second, third = _NUMBERS.unpack(packed)
    return first, second, third
