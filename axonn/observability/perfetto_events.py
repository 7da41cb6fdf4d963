"""Export of spans as a trace that chrome://tracing and ui.perfetto.dev open.

The format is the Trace Event Format of Chromium (document "Trace Event Format" by N. Duca and D. Sinclair), as far as
Perfetto reads it (its documentation, "Visualizing external trace formats"): complete events, metadata, flow events.
A rank is a process, and each kind of work is a lane (thread) of it. Events of one lane must nest or be disjoint, or
Perfetto drops them; here they are disjoint, since overlapping spans go to separate lanes.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

from axonn.errors import RecordError
from axonn.spans import COMPUTE, Span, SpanKind

T = TypeVar("T")

LANES: Mapping[str, tuple[SpanKind, ...]] = {
    "compute": COMPUTE,
    "collectives": (SpanKind.TENSOR, SpanKind.ALL_REDUCE),
    "optimizer": (SpanKind.OPTIMIZER, SpanKind.COPY),
    "messages sent": (SpanKind.SEND,),
    "work with messages": (SpanKind.MESSAGES,),
    "waiting": (SpanKind.RECEIVE_WAIT, SpanKind.IDLE),
}
"""Span kinds of each lane of a rank, by name, in display order."""
_DIRECTIONS = ("activations", "gradients")
_CHUNK = 10_000
_Message = tuple[int, int, int, int, int]
"""Receiver, direction, chunk, step, microbatch."""


def disjoint_lanes(items: Iterable[T], bounds: Callable[[T], tuple[float, float]]) -> list[tuple[int, T]]:
    """Return (lane, item) in order of start, such that the items of one lane do not overlap; `bounds`: (start, end).

    Greedy interval colouring: the number of lanes is the largest number of items that overlap at once.
    """
    ordered = sorted(((*bounds(item), number, item) for number, item in enumerate(items)), key=lambda row: row[:3])
    busy: list[tuple[float, int]] = []  # (end of its last item, lane).
    free: list[int] = []
    placed = []
    for start, end, _, item in ordered:
        while busy and busy[0][0] <= start:
            heappush(free, heappop(busy)[1])
        lane = heappop(free) if free else len(busy)
        heappush(busy, (end, lane))
        placed.append((lane, item))
    return placed


def write_trace(
    path: Path | str,
    spans: Sequence[Span],
    *,
    names: Mapping[int, str] | None = None,
    about: Mapping[str, str] | None = None,
) -> int:
    """Write a trace, atomically, compressed when the name ends in .gz; return the number of its events.

    `names`: of the ranks (default: "rank R"). `about`: metadata that a viewer shows about the trace. Equal spans give
    equal bytes. A million spans take about 25 s, compressed 45 s. Raises `RecordError` when there are no spans.
    """
    path = Path(path)
    if not spans:
        raise RecordError(f"{path}: there are no spans to write; was the run traced?")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        with temporary.open("wb") as file:
            # Neither date nor name goes into the compressed file.
            packed = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.suffix == ".gz" else None
            out: IO[bytes] | gzip.GzipFile = file if packed is None else packed
            head = json.dumps({"displayTimeUnit": "ms", "otherData": dict(about or {})})[:-1]
            out.write(f'{head}, "traceEvents": [\n'.encode())
            events = trace_events(spans, names=names or {})
            while chunk := list(islice(events, _CHUNK)):
                out.write(((",\n" if count else "") + ",\n".join(chunk)).encode())
                count += len(chunk)
            out.write(b"\n]}\n")
            if packed is not None:
                packed.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def trace_events(spans: Sequence[Span], *, names: Mapping[int, str]) -> Iterator[str]:
    """Yield each event as JSON; the first span starts at 0."""
    origin = min(s.start for s in spans)
    by_rank: dict[int, list[Span]] = {}
    for span in spans:
        by_rank.setdefault(span.rank, []).append(span)
    arrows = _arrows(spans, origin)

    def bounds(span: Span) -> tuple[int, int]:
        start = _nanoseconds(span.start - origin)
        return start, max(start, _nanoseconds(span.end - origin))

    for rank in sorted(by_rank):
        yield from _named("process", rank, 0, names.get(rank, f"rank {rank}"), rank)
        first = 0
        for title, kinds in LANES.items():
            placed = disjoint_lanes((s for s in by_rank[rank] if s.kind in kinds), bounds)
            lanes = 1 + max((lane for lane, _ in placed), default=-1)
            for lane in range(lanes):
                yield from _named("thread", rank, first + lane, f"{title} {lane + 1}" if lane else title, first + lane)
            for lane, span in placed:
                start, end = bounds(span)
                yield _complete(span, first + lane, start, end)
                if span.kind in (SpanKind.SEND, SpanKind.RECEIVE_WAIT) and (arrow := arrows.get(_message(span))):
                    number, sent, received = arrow
                    if span.kind == SpanKind.SEND:
                        yield _flow("s", number, rank, first + lane, sent)
                    elif end - 1 == received:
                        yield _flow("f", number, rank, first + lane, received)
            first += lanes


def _arrows(spans: Iterable[Span], origin: float) -> dict[_Message, tuple[int, int, int]]:
    """Return number, start and end of the flow arrow of each message that a rank waited for.

    It leads from the start of the send to the end of the wait.
    """
    sent: dict[_Message, int] = {}
    received: dict[_Message, int] = {}
    for s in spans:
        if s.kind == SpanKind.SEND:
            sent[_message(s)] = _nanoseconds(s.start - origin)
        elif s.kind == SpanKind.RECEIVE_WAIT and s.microbatch >= 0 and s.end - s.start >= 1e-9:
            received[_message(s)] = max(received.get(_message(s), 0), _nanoseconds(s.end - origin) - 1)
    # Where clocks are not aligned well enough, a message may seem to be received before it was sent.
    pairs = sorted((key, start, received[key]) for key, start in sent.items() if received.get(key, -1) >= start)
    return {key: (number, start, end) for number, (key, start, end) in enumerate(pairs)}


def _message(span: Span) -> _Message:
    """Return the key that a send span and the receive-wait span of the same message share."""
    receiver = span.peer if span.kind == SpanKind.SEND else span.rank
    return receiver, span.direction, span.chunk, span.step, span.microbatch


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _microseconds(nanoseconds: int) -> str:
    """Format without rounding, so that adjacent events stay disjoint."""
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03d}"


def _named(kind: str, pid: int, tid: int, name: str, order: int) -> Iterator[str]:
    yield f'{{"ph": "M", "name": "{kind}_name", "pid": {pid}, "tid": {tid}, "args": {{"name": {json.dumps(name)}}}}}'
    yield f'{{"ph": "M", "name": "{kind}_sort_index", "pid": {pid}, "tid": {tid}, "args": {{"sort_index": {order}}}}}'


def _complete(span: Span, tid: int, start: int, end: int) -> str:
    name = span.kind.value
    if span.microbatch >= 0:
        name += f" m{span.microbatch}"
    if span.shard >= 0:
        name += f" s{span.shard}"
    fields = {
        key: value
        for key in ("step", "microbatch", "chunk", "layer", "shard", "peer")
        if (value := getattr(span, key)) >= 0
    }
    arguments = ", ".join(f'"{key}": {value}' for key, value in fields.items())
    if span.direction >= 0:
        arguments += f', "direction": "{_DIRECTIONS[span.direction]}"'
    return (
        f'{{"ph": "X", "name": "{name}", "cat": "{span.kind.value}", "pid": {span.rank}, "tid": {tid}, '
        f'"ts": {_microseconds(start)}, "dur": {_microseconds(end - start)}, "args": {{{arguments}}}}}'
    )


def _flow(phase: str, number: int, pid: int, tid: int, at: int) -> str:
    bind = ', "bp": "e"' if phase == "f" else ""
    return (
        f'{{"ph": "{phase}", "name": "message", "cat": "message", "id": {number}, "pid": {pid}, "tid": {tid}, '
        f'"ts": {_microseconds(at)}{bind}}}'
    )
