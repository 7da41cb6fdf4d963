"""Spans: which rank did what, and when. The engine, the simulator and the baselines all write this table.

Times are seconds on one clock for all ranks of a run (`ClockOffset` is applied when a recorder is made).
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from axonn.durable_files import opened, reason_of
from axonn.errors import RecordError


class SpanKind(StrEnum):
    """The kind of work a rank was doing."""

    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_INPUT = "backward-input"
    BACKWARD_WEIGHT = "backward-weight"
    SEND = "send"
    RECEIVE_WAIT = "receive-wait"
    MESSAGES = "messages"
    """Work between two tasks: sending messages, taking those that have arrived, choosing the next task."""
    ALL_REDUCE = "all-reduce"
    TENSOR = "tensor-collective"
    """A collective along row or col, from its start until its result is available."""
    OPTIMIZER = "optimizer"
    COPY = "copy"
    IDLE = "idle"


class Span(NamedTuple):
    """One row of the table. Fields that do not apply to its kind are -1.

    `chunk` is the rank's own chunk that computes or waits. A send span has the receiver's chunk, and the receiver as
    its `peer`, so that it matches the receive-wait span of the same message. `layer` is the first layer of the chunk
    that computes or waits; predicted spans of a collective on the tensor axes, and of the compute up to it, name the
    layer itself. `direction` is 0 for activations and 1 for gradients. A send span starts when the message is posted
    and ends when its buffer is free again. `shard` is the sub-shard that computes, or that the collective belongs to,
    where a microbatch is cut into several.
    """

    rank: int
    kind: SpanKind
    step: int
    microbatch: int
    layer: int
    direction: int
    start: float
    end: float
    chunk: int = -1
    peer: int = -1
    shard: int = -1


_VERSION = "axonn-spans/3"
_SCHEMA = pa.schema(
    [
        ("rank", pa.int32()),
        ("kind", pa.dictionary(pa.int8(), pa.string())),
        ("step", pa.int32()),
        ("microbatch", pa.int32()),
        ("layer", pa.int32()),
        ("direction", pa.int8()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("chunk", pa.int16()),
        ("peer", pa.int32()),
        ("shard", pa.int16()),
    ],
    metadata={"schema": _VERSION},
)
_VERSIONS = {_VERSION: _SCHEMA, "axonn-spans/2": _SCHEMA.remove(_SCHEMA.get_field_index("shard"))}
"""Schemas that can be read, by version."""
_MOST_ROWS = 50_000_000
"""Most spans in a file: a recorder writes about ten thousand at a time."""

COMPUTE = (SpanKind.FORWARD, SpanKind.BACKWARD, SpanKind.BACKWARD_INPUT, SpanKind.BACKWARD_WEIGHT)


class SpanRecorder:
    """Recorder of one rank's spans. `clock_offset` (seconds) is added to this rank's clock.

    With a `folder`, `flush` moves the collected spans to a file in it, so that a long run does not keep them in memory;
    `read_spans` reads such a folder. `on_span` is called at the end of each span, recorded or not.
    """

    def __init__(
        self,
        rank: int,
        *,
        clock_offset: float = 0.0,
        folder: Path | None = None,
        on_span: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank = rank
        self.step = 0
        self.clock_offset = clock_offset
        self.folder = folder
        self.recording = True
        """False during work that is not part of a training step, such as an evaluation."""
        self.spans: list[Span] = []
        self._on_span = on_span

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause recording inside the block."""
        previous, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = previous

    @staticmethod
    def now() -> float:
        """Return the time on this rank's clock, in seconds."""
        return time.perf_counter()

    def add(
        self,
        kind: SpanKind,
        start: float,
        end: float,
        *,
        microbatch: int = -1,
        layer: int = -1,
        direction: int = -1,
        chunk: int = -1,
        peer: int = -1,
        shard: int = -1,
    ) -> None:
        """Record a span from `start` to `end`, both readings of `now`; the other fields are those of `Span`."""
        self._on_span()
        if not self.recording:
            return
        start, end = start + self.clock_offset, end + self.clock_offset
        row = Span(self.rank, kind, self.step, microbatch, layer, direction, start, end, chunk, peer, shard)
        self.spans.append(row)

    def flush(self, *, at_least: int = 1) -> bool:
        """Move the spans to a file of the folder, named after its first step, if there are at least `at_least`.

        Call it between two steps, so that all spans of a step are in one file. Returns True if a file was written.
        """
        if self.folder is None or len(self.spans) < at_least:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        write_spans(self.folder / f"{self.spans[0].step:08d}.parquet", self.spans)
        self.spans.clear()
        return True


def span_files(folder: Path | str, *, first_step: int = 0) -> list[Path]:
    """Return the files of a recorder's folder that may hold spans of `first_step` or later steps, in order."""
    files = sorted(p for p in Path(folder).glob("[0-9]*.parquet") if p.stem.isascii() and p.stem.isdecimal())
    starting_before = [i for i, file in enumerate(files) if int(file.stem) <= first_step]
    return files[starting_before[-1] :] if starting_before else files


def write_spans(path: Path | str, spans: Iterable[Span]) -> None:
    """Write spans as Parquet, atomically."""
    path = Path(path)
    rows = list(spans)
    columns = list(zip(*rows, strict=True)) if rows else [() for _ in _SCHEMA]
    arrays = [
        pa.array([str(v) for v in column] if field.name == "kind" else column, type=field.type)
        for field, column in zip(_SCHEMA, columns, strict=True)
    ]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA), temporary, write_page_checksum=True)
    temporary.replace(path)


def read_spans(path: Path | str) -> list[Span]:
    """Read the spans of a file, or of all files of a recorder's folder.

    The previous version of the schema, which has no sub-shards, can be read too. Raises `RecordError` for a file that
    `write_spans` did not write or that is damaged.
    """
    if Path(path).is_dir():
        return [span for file in span_files(path) for span in read_spans(file)]
    try:
        with opened(path) as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            version = (parquet.schema_arrow.metadata or {}).get(b"schema", b"none").decode("utf-8", "replace")
            rows = parquet.metadata.num_rows
            if rows > _MOST_ROWS:
                raise RecordError(f"{path}: says that it has {rows} spans, more than any run leaves; run it again")
            if version not in _VERSIONS:
                raise RecordError(
                    f"{path}: has schema {version!r}, expected '{_VERSION}'; write it anew with this version"
                )
            table = parquet.read().cast(_VERSIONS[version])
        if any(column.null_count for column in table.columns):
            raise RecordError(f"{path}: a span in it lacks a value; the file is damaged, run it again")
        times = pa.chunked_array([*table["start"].chunks, *table["end"].chunks], type=pa.float64())
        if not pc.all(pc.is_finite(times), min_count=0).as_py():
            raise RecordError(f"{path}: a span in it has a time that is no number; the file is damaged, run it again")
        spans = table.to_pylist()
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError, MemoryError) as error:
        raise RecordError(f"{path}: is not a span file: {reason_of(error)}") from error
    try:
        return [Span(**{**row, "kind": SpanKind(row["kind"])}) for row in spans]
    except ValueError as error:
        raise RecordError(f"{path}: {error}; a later version wrote it, read it with that one") from error


class TimeBreakdown(NamedTuple):
    """Mean seconds per rank in one window of time, each instant counted once (docs/design.md, section 4.6)."""

    compute: float
    optimizer: float
    all_reduce: float
    tensor: float
    """Waiting for collectives on the tensor axes that no compute hides."""
    point_to_point: float
    """Waiting for a message that was already under way, and this rank's own message handling."""
    bubble: float
    """Waiting for a message that had not been sent yet."""
    unexplained: float

    @property
    def total(self) -> float:
        """Sum of all parts, in seconds."""
        return sum(self)


@dataclass(frozen=True)
class _Interval:
    start: float
    end: float


def breakdown(spans: Sequence[Span]) -> TimeBreakdown:
    """Split the time from the first start to the last end into parts, averaged over ranks.

    An instant covered by several spans belongs to the first of: compute, optimizer, all-reduce, collective on the
    tensor axes, message handling (which is point-to-point), waiting. Waiting is split into bubble and point-to-point at
    the time when the awaited message was sent; it is all bubble where no send span has the receiver, direction, chunk
    and microbatch that are waited for. Raises `RecordError` without spans.
    """
    if not spans:
        raise RecordError("there are no spans to break down; was the run traced?")
    begin = min(s.start for s in spans)
    end = max(s.end for s in spans)
    sent = {(s.peer, s.direction, s.chunk, s.step, s.microbatch): s.start for s in spans if s.kind == SpanKind.SEND}
    totals = [0.0] * len(TimeBreakdown._fields)
    ranks = sorted({s.rank for s in spans})
    for rank in ranks:
        covered: list[_Interval] = []
        rank_spans = [s for s in spans if s.rank == rank]
        point_to_point = _intervals_of(rank_spans, SpanKind.MESSAGES)
        bubble: list[_Interval] = []
        priority: list[list[_Interval]] = [
            _intervals_of(rank_spans, *COMPUTE),
            _intervals_of(rank_spans, SpanKind.OPTIMIZER, SpanKind.COPY),
            _intervals_of(rank_spans, SpanKind.ALL_REDUCE),
            _intervals_of(rank_spans, SpanKind.TENSOR),
            point_to_point,
            bubble,
        ]
        for s in rank_spans:
            if s.kind not in (SpanKind.RECEIVE_WAIT, SpanKind.IDLE):
                continue
            sent_at = sent.get((rank, s.direction, s.chunk, s.step, s.microbatch))
            split = s.end if sent_at is None or s.kind == SpanKind.IDLE else min(max(sent_at, s.start), s.end)
            bubble.append(_Interval(s.start, split))
            point_to_point.append(_Interval(split, s.end))
        for part, intervals in enumerate(priority):
            covered_before = _length(covered)
            covered = _union(covered + intervals)
            totals[part] += _length(covered) - covered_before
        totals[-1] += (end - begin) - _length(covered)
    return TimeBreakdown(*(t / len(ranks) for t in totals))


class Overlap(NamedTuple):
    """Overlap of compute with collectives on the tensor axes in one window of time, mean seconds per rank."""

    compute: float
    collective: float
    """Time with at least one collective under way, whether it moved data or waited for another rank."""
    hidden: float
    """Time with a collective under way while the same rank computed."""
    hideable: float
    """Most that any order of a task's operations could hide: for each task, the lesser of its collectives' time and its
    compute time. (No collective outlasts its task. Not accounted for: the first computation of a task has nothing to
    hide yet, and nothing is left to hide its last collective.)"""

    @property
    def hidden_share(self) -> float:
        """Hidden time as a share of the collectives' time; 0 where there are none."""
        return self.hidden / self.collective if self.collective else 0.0

    @property
    def reached(self) -> float:
        """Hidden time as a share of what can be hidden; 1 where that is nothing."""
        return self.hidden / self.hideable if self.hideable else 1.0


def overlap(spans: Sequence[Span]) -> Overlap:
    """Return how much of the collectives on the tensor axes ran under compute; all zero without spans."""
    ranks = sorted({s.rank for s in spans})
    totals = [_rank_overlap([s for s in spans if s.rank == rank]) for rank in ranks]
    return (
        Overlap(*(sum(column) / len(ranks) for column in zip(*totals, strict=True))) if ranks else Overlap(0, 0, 0, 0)
    )


def _rank_overlap(spans: Sequence[Span]) -> Overlap:
    """Return the overlap of one rank, which runs one task after another."""
    tasks: dict[tuple[int, SpanKind, int, int], list[_Interval]] = {}
    for s in spans:
        if s.kind in COMPUTE:
            tasks.setdefault((s.step, s.kind, s.microbatch, s.chunk), []).append(_Interval(s.start, s.end))
    computed = sorted(tasks.values(), key=lambda task: min(i.start for i in task))
    begins = [min(i.start for i in task) for task in computed]
    ends = [max(i.end for i in task) for task in computed]
    inside: list[list[_Interval]] = [[] for _ in computed]
    outside: list[_Interval] = []
    for i in _intervals_of(spans, SpanKind.TENSOR):
        last = bisect_right(begins, i.start) - 1
        (inside[last] if last >= 0 and i.start <= ends[last] else outside).append(i)
    compute = hidden = hideable = 0.0
    collective = _length(_union(outside))
    for task, collectives in zip(computed, inside, strict=True):
        compute_s, collective_s = _length(_union(task)), _length(_union(collectives))
        compute += compute_s
        collective += collective_s
        hidden += compute_s + collective_s - _length(_union(task + collectives))
        hideable += min(compute_s, collective_s)
    return Overlap(compute, collective, hidden, hideable)


def _intervals_of(spans: Sequence[Span], *kinds: SpanKind) -> list[_Interval]:
    return [_Interval(s.start, s.end) for s in spans if s.kind in kinds]


def _union(intervals: Iterable[_Interval]) -> list[_Interval]:
    merged: list[_Interval] = []
    for i in sorted(intervals, key=lambda i: i.start):
        if merged and i.start <= merged[-1].end:
            merged[-1] = _Interval(merged[-1].start, max(merged[-1].end, i.end))
        elif i.end > i.start:
            merged.append(i)
    return merged


def _length(intervals: Iterable[_Interval]) -> float:
    return sum(i.end - i.start for i in intervals)
