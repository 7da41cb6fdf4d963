"""Timelines of spans: rows, what is hidden, and pictures with the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axonn.spans import Span, SpanKind, overlap
from plots import style
from plots.timeline_picture import View, draw_timeline, full_view, hidden_and_exposed, rows_of_rank


def span(kind: SpanKind, start: float, end: float, *, rank: int = 0, shard: int = -1, microbatch: int = 0) -> Span:
    return Span(rank, kind, 0, microbatch, 0, -1, start, end, 0, shard=shard)


def length(intervals: Sequence[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


# Tasks one after another, each with computations and collectives anywhere inside of it.
PIECES = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted), min_size=1, max_size=8)


@given(st.lists(st.tuples(PIECES, PIECES), min_size=1, max_size=4))
def test_what_is_drawn_as_hidden_is_what_overlap_counts(tasks: list[tuple[list[list[int]], list[list[int]]]]) -> None:
    spans = []
    for number, (computing, collectives) in enumerate(tasks):
        first, last = 100.0 * number, 100.0 * number + 60
        ends = [(first, first + 1), (last, last + 1)]
        spans += [span(SpanKind.FORWARD, *i, microbatch=number) for i in ends]
        spans += [span(SpanKind.FORWARD, first + a, first + b, microbatch=number) for a, b in computing]
        spans += [span(SpanKind.TENSOR, first + a, first + b, microbatch=number) for a, b in collectives]
    hidden, exposed = hidden_and_exposed(spans)
    found = overlap(spans)
    assert length(hidden) == pytest.approx(found.hidden)
    assert length(exposed) == pytest.approx(found.collective - found.hidden)


@pytest.fixture
def spans() -> list[Span]:
    """Two ranks: two sub-shards whose collectives are half hidden, a message, waiting, the step."""
    found = []
    for rank in (0, 1):
        found += [
            span(SpanKind.FORWARD, 0, 2, rank=rank, shard=0),
            span(SpanKind.TENSOR, 2, 4, rank=rank, shard=0),
            span(SpanKind.BACKWARD, 2, 3, rank=rank, shard=1),
            span(SpanKind.ALL_REDUCE, 4, 5, rank=rank),
            span(SpanKind.OPTIMIZER, 5, 6, rank=rank),
            span(SpanKind.SEND, 2, 3, rank=rank),
            span(SpanKind.IDLE, 6, 7, rank=rank),
        ]
    return found


def test_rows_have_everything_once(spans: list[Span]) -> None:
    rows = rows_of_rank([s for s in spans if s.rank == 0], layers={})
    assert list(rows) == [
        "compute", "collectives of sub-shard 0", "are they hidden?", "messages sent", "waiting", "gradient all-reduce",
    ]  # fmt: skip
    assert sum(len(bars) for name, bars in rows.items() if "hidden" not in name) == 7
    fates = [(b.style.name, b.start, b.end) for b in rows["are they hidden?"]]
    assert fates == [("hidden under compute", 2, 3), ("exposed", 3, 4)]
    # What a picture tells apart by colour it tells apart by name, too.
    styles = {bar.style for bars in rows.values() for bar in bars}
    assert len({s.name for s in styles}) == len(styles) == len({(s.colour, s.hatch) for s in styles})


def test_a_window_leaves_out_what_it_does_not_meet(spans: list[Span]) -> None:
    view = View(begin=4.5, end=7, ranks=(1,))
    assert {s.rank for s in view.of(spans, 1)} == {1}
    assert list(view.rows(spans, 1)) == ["compute", "waiting", "gradient all-reduce"]
    assert full_view(spans).ranks == (0, 1)
    assert full_view(spans, ranks=[1]) == View(begin=0, end=7, ranks=(1,))


def test_a_picture_has_the_same_bytes_again_and_says_what_it_shows(spans: list[Span], tmp_path: Path) -> None:
    def draw(folder: Path) -> list[bytes]:
        with style.styled("timeline"):
            figure = draw_timeline(
                spans, full_view(spans), title="T", names={0: "rank 0 (col 0)"}, foot="first 2 ranks"
            )
            assert [a.get_title(loc="left") for a in figure.axes] == ["rank 0 (col 0)", "rank 1"]
            assert "first 2 ranks" in figure.axes[-1].get_xlabel()
            names = [t.get_text() for t in figure.legends[0].get_texts()]
            assert {"forward, sub-shard 0", "hidden under compute", "exposed", "optimizer"} <= set(names)
            return [path.read_bytes() for path in style.save(figure, "t", folder)]

    assert draw(tmp_path / "a") == draw(tmp_path / "b")
