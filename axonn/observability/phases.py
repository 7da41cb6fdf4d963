"""Phases of a batch, from spans: the pipeline, then the gradient all-reduce, then the optimizer."""

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
"""Kinds of the pipeline phase; a task may end with a collective along the tensor axes."""
_UPDATE = (SpanKind.OPTIMIZER, SpanKind.COPY)


class Phases(NamedTuple):
    """Seconds of the phases of a batch, mean over batches; disjoint, they add up to the batch except for waits."""

    inter_layer: float
    """Pipeline phase: from the first forward to the last backward of all ranks."""
    all_reduce: float
    """Gradient reduction after the pipeline while the optimizer is idle, on the rank that ends last."""
    optimizer: float
    """Optimizer after the pipeline on the same rank, including its copies from and to host memory."""


def phases(spans: Sequence[Span]) -> Phases:
    """Return the phases of the batches (steps) in `spans`.

    Reductions and updates that a rank runs while another still runs backwards belong to the pipeline phase. Raises
    `RecordError` for a batch without a forward or backward.
    """
    steps: dict[int, list[Span]] = {}
    for span in spans:
        steps.setdefault(span.step, []).append(span)
    if not steps:
        raise RecordError("there are no spans to find phases in; was the run traced?")
    each = [_of_batch(step, batch) for step, batch in steps.items()]
    return Phases(*(sum(column) / len(each) for column in zip(*each, strict=True)))


def _of_batch(step: int, spans: Sequence[Span]) -> Phases:
    tasks = [s for s in spans if s.kind in _PIPELINE]
    if not tasks:
        raise RecordError(f"batch {step} has no span of a forward or backward; it has no phases")
    begin, end = min(s.start for s in tasks), max(s.end for s in tasks)
    finishing = [s for s in spans if s.kind == SpanKind.ALL_REDUCE or s.kind in _UPDATE]
    # Several ranks may end at the same time; the choice must not depend on the order of the spans.
    last = max(finishing, key=lambda s: (s.end, -s.rank), default=None)
    of_last_rank = [s for s in finishing if last is not None and s.rank == last.rank]
    updating = _covered((s for s in of_last_rank if s.kind in _UPDATE), after=end)
    return Phases(end - begin, _covered(of_last_rank, after=end) - updating, updating)


def _covered(spans: Iterable[Span], *, after: float) -> float:
    """Return the seconds after time `after` during which at least one of the spans runs."""
    total, reached = 0.0, after
    for span in sorted(spans, key=lambda s: s.start):
        total += max(span.end - max(span.start, reached), 0.0)
        reached = max(reached, span.end)
    return total
