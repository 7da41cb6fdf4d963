"""The phases of a batch, from spans: the pipeline, then the gradients' all-reduce, then the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from axonn.errors import RecordError
from axonn.spans import Span, SpanKind

_PIPELINE = (
    SpanKind.FORWARD,
    SpanKind.BACKWARD,
    SpanKind.BACKWARD_INPUT,
    SpanKind.BACKWARD_WEIGHT,
    SpanKind.TENSOR,
)
"""Tasks; the last of them may end with a collective of the tensor axes."""
_UPDATE = (SpanKind.OPTIMIZER, SpanKind.COPY)


class Phases(NamedTuple):
    """Seconds of a batch, mean over batches. But for waiting they add up to the batch, for they do not overlap."""

    inter_layer: float
    """From the first forward to the last backward of all ranks."""
    all_reduce: float
    """After that and on the rank that ends last, as the next: reducing gradients while the optimizer does nothing."""
    optimizer: float
    """Its copies from and to host memory included."""


def phases(spans: Sequence[Span]) -> Phases:
    """The phases of the batches (steps) that `spans` are of.

    What a rank reduces or updates while another still runs backwards belongs to the first phase. Raises `RecordError`
    for a batch without a forward or backward.
    """
    steps: dict[int, list[Span]] = {}
    for span in spans:
        steps.setdefault(span.step, []).append(span)
    if not steps:
        raise RecordError("there are no spans to find phases in; was the run traced?")
    each = [_of_batch(step, own) for step, own in steps.items()]
    return Phases(*(sum(column) / len(each) for column in zip(*each, strict=True)))


def _of_batch(step: int, spans: Sequence[Span]) -> Phases:
    tasks = [s for s in spans if s.kind in _PIPELINE]
    if not tasks:
        raise RecordError(f"batch {step} has no span of a forward or backward; it has no phases")
    begin, end = min(s.start for s in tasks), max(s.end for s in tasks)
    finishing = [s for s in spans if s.kind == SpanKind.ALL_REDUCE or s.kind in _UPDATE]
    # All ranks may end at once; which of them counts has to be the same whatever the order of the spans is.
    last = max(finishing, key=lambda s: (s.end, -s.rank), default=None)
    own = [s for s in finishing if last is not None and s.rank == last.rank]
    updating = _covered((s for s in own if s.kind in _UPDATE), after=end)
    return Phases(end - begin, _covered(own, after=end) - updating, updating)


def _covered(spans: Iterable[Span], *, after: float) -> float:
    """Seconds after a time in which at least one of the spans is under way."""
    total, reached = 0.0, after
    for span in sorted(spans, key=lambda s: s.start):
        total += max(span.end - max(span.start, reached), 0.0)
        reached = max(reached, span.end)
    return total
