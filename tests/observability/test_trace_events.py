"""Trace files: their events are what viewers accept, whatever overlaps in the spans."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axonn.errors import RecordError
from axonn.observability.perfetto_events import disjoint_lanes, trace_events, write_trace
from axonn.perf.prediction import predict
from axonn.perf.strategy import Strategy
from axonn.spans import Span, SpanKind
from experiments.definition import find_machine, load_model

TIMES = st.floats(0, 1e-5) | st.floats(0, 10)
SPANS = st.lists(
    st.builds(
        lambda rank, kind, start, length, microbatch, peer: Span(
            rank, kind, 0, microbatch, 1, 0, start, start + length, 0, peer if kind == SpanKind.SEND else -1
        ),
        st.integers(0, 2),
        st.sampled_from(list(SpanKind)),
        TIMES,
        TIMES,
        st.integers(-1, 3),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=60,
)


def nanoseconds(text: float | str) -> int:
    return round(float(text) * 1000)


def load(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events: list[dict[str, Any]] = json.loads(data)["traceEvents"]
    return events


def check(events: Sequence[dict[str, Any]], spans: Sequence[Span]) -> None:
    """What viewers ask for: named lanes whose events are disjoint, and arrows that begin and end inside of an event."""
    complete = [e for e in events if e["ph"] == "X"]
    assert len(complete) == len(spans)
    assert min(nanoseconds(e["ts"]) for e in complete) == 0
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for event in complete:
        start = nanoseconds(event["ts"])
        lanes[event["pid"], event["tid"]].append((start, start + nanoseconds(event["dur"])))
    for own in lanes.values():
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(own)))
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert named == set(lanes)
    assert {e["pid"] for e in events if e["name"] == "process_name"} == {s.rank for s in spans}
    arrows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] in "sf":
            arrows[event["id"]].append(event)
            assert any(a <= nanoseconds(event["ts"]) <= b for a, b in lanes[event["pid"], event["tid"]])
    for own in arrows.values():
        assert {e["ph"] for e in own} == {"s", "f"}
        start = max(nanoseconds(e["ts"]) for e in own if e["ph"] == "s")
        assert all(start <= nanoseconds(e["ts"]) for e in own if e["ph"] == "f")


@given(SPANS)
def test_lanes_are_disjoint_whatever_overlaps(spans: list[Span]) -> None:
    bounds = [(s.start, s.end) for s in spans]
    placed = disjoint_lanes(bounds, lambda pair: pair)
    assert sorted(pair for _, pair in placed) == sorted(bounds)
    lanes = defaultdict(list)
    for lane, pair in placed:
        lanes[lane].append(pair)
    for own in lanes.values():
        assert all(a[1] <= b[0] for a, b in pairwise(own))
    # As few as overlap at once, counting those without length where nothing else begins.
    most = max(sum(a <= start < b or start == a for a, b in bounds) for start, _ in bounds)
    assert set(lanes) == set(range(len(lanes)))
    assert len(lanes) <= most


@given(SPANS)
def test_any_spans_make_a_trace_that_opens(spans: list[Span]) -> None:

    unique = {(s.peer, s.microbatch): s for s in spans if s.kind == SpanKind.SEND}.values()
    kept = [s for s in spans if s.kind != SpanKind.SEND or any(s is u for u in unique)]
    check([json.loads(line) for line in trace_events(kept, names={})], kept)


def test_a_message_is_an_arrow_from_its_sending_to_the_end_of_the_wait(tmp_path: Path) -> None:
    spans = [
        Span(0, SpanKind.FORWARD, 0, 3, 0, -1, 5.0, 6.0, 0),
        Span(0, SpanKind.SEND, 0, 3, -1, 0, 6.0, 6.5, 0, 1),
        Span(1, SpanKind.RECEIVE_WAIT, 0, 3, 2, 0, 5.5, 6.25, 0),
        Span(1, SpanKind.FORWARD, 0, 3, 2, -1, 6.25, 7.0, 0, shard=1),
    ]
    assert write_trace(tmp_path / "t.json", spans, names={0: "rank 0 (inter 0)"}) == len(load(tmp_path / "t.json"))
    events = load(tmp_path / "t.json")
    check(events, spans)
    (start,) = (e for e in events if e["ph"] == "s")
    (finish,) = (e for e in events if e["ph"] == "f")
    assert (start["pid"], start["ts"]) == (0, 1e6)
    assert (finish["pid"], finish["ts"], finish["bp"]) == (1, 1.25e6 - 0.001, "e")
    assert start["id"] == finish["id"]
    last = next(e for e in events if e["ph"] == "X" and e["pid"] == 1 and e["cat"] == "forward")
    assert last["name"] == "forward m3 s1"
    assert last["args"] == {"step": 0, "microbatch": 3, "chunk": 0, "layer": 2, "shard": 1}
    assert next(e for e in events if e["name"] == "process_name")["args"]["name"] == "rank 0 (inter 0)"


def test_a_wait_that_ends_before_its_message_is_sent_has_no_arrow(tmp_path: Path) -> None:
    spans = [
        Span(0, SpanKind.SEND, 0, 3, -1, 0, 6.0, 6.5, 0, 1),
        Span(1, SpanKind.RECEIVE_WAIT, 0, 3, 2, 0, 5.5, 5.9, 0),
    ]
    write_trace(tmp_path / "t.json", spans)
    assert not [e for e in load(tmp_path / "t.json") if e["ph"] in "sf"]


def test_the_same_spans_give_the_same_bytes(tmp_path: Path) -> None:
    spans = [Span(0, SpanKind.SEND, 0, m, -1, 0, m, m + 2.5, 0, 1) for m in range(4)]
    for name in ("a.json", "a.json.gz"):
        write_trace(tmp_path / name, spans)
        first = (tmp_path / name).read_bytes()
        write_trace(tmp_path / name, spans)
        assert (tmp_path / name).read_bytes() == first
    assert load(tmp_path / "a.json.gz") == load(tmp_path / "a.json")
    names = [e["args"]["name"] for e in load(tmp_path / "a.json") if e["name"] == "thread_name"]
    assert names == ["messages sent", "messages sent 2", "messages sent 3"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.json.gz"]


def test_nothing_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no spans to write"):
        write_trace(tmp_path / "t.json", [])
    assert list(tmp_path.iterdir()) == []


def test_a_predicted_pipeline_with_sub_shards_is_a_good_trace(tmp_path: Path) -> None:

    given = {"grid": {"inter": 3, "row": 2}, "microbatch_size": 4, "overdecomposition": 2}
    strategy = Strategy.model_validate(given | {"overlap_input_gradients": True})
    found = predict(load_model("gpt-12b"), find_machine("summit"), strategy, batch_size=16, record=True)
    spans = found.spans()
    write_trace(tmp_path / "t.json.gz", spans)
    events = load(tmp_path / "t.json.gz")
    check(events, spans)
    assert [e for e in events if e["ph"] == "f"]
    assert {e["args"].get("shard") for e in events if e.get("cat") == "tensor-collective"} == {0, 1}
