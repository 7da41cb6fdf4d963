"""Traffic that a rank has sent, by grid axis and operation: collectives, messages between stages, decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from axonn.distributed.collectives import Call, CallKind, Collectives
from axonn.distributed.transport.base import Decisions, SentMessage, Transport
from axonn.grid import AXES, Axis

TrafficKind = Literal[CallKind, "message", "decision"]
_NUMBERS = 3
"""Integers that make up a decision."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Total that one rank has sent along `axis` with one kind of operation.

    `axis`: "data", "inter", "row" or "col", several joined by "+", or "all". `elements`, `bytes`: inputs of the
    operations on this rank. `sent_bytes`: bytes that the rank sends if the ranks form a ring: 2 (n - 1) / n of
    the bytes of an all-reduce, n - 1 times its own shard in an all-gather; a message or a decision counts once.
    """

    axis: str
    kind: TrafficKind
    count: int
    elements: int
    bytes: int
    sent_bytes: float


class TrafficMeter:
    """Counter of what one rank sends through `collectives` and `transport` between `start` and `stop`."""

    def __init__(self, collectives: Collectives, transport: Transport | None = None) -> None:
        self._collectives = collectives
        self._transport = transport
        self._calls: Counter[Call] = Counter()
        self._messages: Counter[SentMessage] = Counter()
        self._decisions = Decisions()

    def start(self) -> None:
        """Start counting from zero."""
        self._calls, self._messages, self._decisions = self._now()

    def stop(self) -> None:
        """Stop counting."""
        calls, messages, decisions = self._now()
        self._calls = calls - self._calls
        self._messages = messages - self._messages
        before = self._decisions
        self._decisions = Decisions(decisions.messages - before.messages, decisions.bytes - before.bytes)

    def read(self) -> list[Traffic]:
        """Return the traffic that was counted."""
        return summary(self._calls, self._messages, self._decisions)

    def _now(self) -> tuple[Counter[Call], Counter[SentMessage], Decisions]:
        calls = self._collectives.calls.copy()
        if self._transport is None:
            return calls, Counter(), Decisions()
        return calls, self._transport.calls.copy(), replace(self._transport.decisions)


def axis_name(axes: Iterable[Axis]) -> str:
    """Return the name of `axes` in `Traffic` and records."""
    names = tuple(axes)
    return "all" if set(names) == set(AXES) else "+".join(names)


def ring_bytes(call: Call) -> float:
    """Return the bytes that a rank sends in one collective over a ring."""
    ranks = len(call.ranks)
    if call.kind == "all-gather":
        return float((ranks - 1) * call.bytes)
    return 2 * (ranks - 1) / ranks * call.bytes


def summary(
    calls: Mapping[Call, int], messages: Mapping[SentMessage, int] | None = None, decisions: Decisions | None = None
) -> list[Traffic]:
    """Return the traffic of `calls` and `messages` (with their counts) and `decisions`, sorted by axis and kind.

    Decisions go to the other ranks of a stage, along row and col.
    """
    parts: dict[tuple[str, TrafficKind], list[tuple[int, int, int, float]]] = {}
    for call, count in calls.items():
        part = count, count * call.elements, count * call.bytes, count * ring_bytes(call)
        parts.setdefault((axis_name(call.axes), call.kind), []).append(part)
    for message, count in (messages or {}).items():
        part = count, count * message.elements, count * message.bytes, float(count * message.bytes)
        parts.setdefault(("inter", "message"), []).append(part)
    if decisions is not None and decisions.messages:
        part = decisions.messages, _NUMBERS * decisions.messages, decisions.bytes, float(decisions.bytes)
        parts["row+col", "decision"] = [part]
    traffic = []
    for (axis, kind), rows in sorted(parts.items()):
        counts, elements, sizes, sent = zip(*rows, strict=True)
        traffic.append(
            Traffic(
                axis=axis, kind=kind, count=sum(counts), elements=sum(elements), bytes=sum(sizes), sent_bytes=sum(sent)
            )
        )
    return traffic


def sent_by_axis(traffic: Iterable[Traffic]) -> dict[str, int]:
    """Return the sum of `sent_bytes` by axis, rounded to whole bytes."""
    total: dict[str, float] = {}
    for part in traffic:
        total[part.axis] = total.get(part.axis, 0.0) + part.sent_bytes
    return {axis: round(value) for axis, value in total.items()}
