"""Record and span files: round trips, what is refused, and the breakdown of spans into parts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from axonn.errors import RecordError
from axonn.grid import ProcessGrid
from axonn.observability.records import (
    Execution,
    Failure,
    Machine,
    Record,
    Workload,
    gpt_flops,
    read_all,
    read_records,
    write_records,
)
from axonn.schedules import ScheduleSpec
from axonn.spans import Span, SpanKind, SpanRecorder, TimeBreakdown, breakdown, read_spans, write_spans


def record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "kind": "measured",
        "experiment": "fig6",
        "point": "gpt-8x256-2r",
        "asked": Workload(
            model="gpt-8x256",
            parameters=10,
            gpus=2,
            batch_size=32,
            seq_len=128,
            precision="float32",
            layers=8,
            hidden=256,
            vocab=2048,
        ),
        "ran": Execution(
            framework="AxoNN",
            version="0.1",
            grid=ProcessGrid(inter=2),
            microbatch_size=4,
            schedule=ScheduleSpec(in_flight_limit=4),
            microbatches=8,
        ),
        "machine": Machine(name="this machine", cores=2),
        "source": "axonn run experiments/fig6.yaml",
        "batch_time_s": 0.1 + 0.2,
        "batch_times_s": [1.0, 0.1 + 0.2],
        "warmup_batches": 1,
        "losses": [7.6, 7.1],
    }
    return Record(**(values | changes))


FAILED = {"batch_time_s": None, "failure": Failure(cause="dead-rank", rank=1, detail="rank 1 was killed by SIGKILL")}


def test_records_survive_the_round_trip(tmp_path: Path) -> None:
    records = [record(), record(**FAILED), record(kind="published", note="§ VI, 12 µs")]
    path = tmp_path / "new" / "folder" / "records.json"
    write_records(path, records)
    assert read_records(path) == records
    assert [p.name for p in path.parent.iterdir()] == ["records.json"]
    assert json.loads(path.read_text())["schema"] == "axonn-records/1"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_the_losses_of_a_diverged_run_survive_the_round_trip(tmp_path: Path, loss: float) -> None:
    diverged = record(
        batch_time_s=None, failure=Failure(cause="nan", detail="rank 0: the loss is nan"), losses=[7.6, loss]
    )
    path = tmp_path / "records.json"
    write_records(path, [diverged])
    assert read_records(path)[0].losses == pytest.approx([7.6, loss], nan_ok=True)


def test_all_records_of_a_folder_in_the_order_of_the_file_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_records(tmp_path / f"{name}.json", [record(point=name)])
    (tmp_path / "notes.txt").write_text("not a record")
    assert [r.point for r in read_all(tmp_path)] == ["a", "b", "c"]


def test_writing_over_a_file_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    write_records(path, [record(), record()])
    write_records(path, [record(point="other")])
    assert [r.point for r in read_records(path)] == ["other"]


@pytest.mark.parametrize("changes", [{"batch_time_s": None}, {"failure": FAILED["failure"]}])
def test_a_record_has_either_a_time_or_a_failure(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either a batch_time_s or a failure"):
        record(**changes)
    path = tmp_path / "records.json"
    write_records(path, [record()])
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content["records"][0][key] = None if value is None else {"cause": "nan", "detail": "x"}
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=r"records\.json: 'records\.0.*either a batch_time_s or a failure"):
        read_records(path)


@pytest.mark.parametrize("content", ['{"schema": "axonn-records/2", "records": []}', '{"records": []}', "[1, 2]"])
def test_a_foreign_schema_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "records.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=r"records\.json: has schema '.*', expected 'axonn-records/1'; remove it"):
        read_records(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"schema": "axonn-records/1", "records": ['])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"records\.json: is not a record file"):
        read_records(path)
    with pytest.raises(RecordError, match=r"none\.json: is not a record file"):
        read_records(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("kind", "guessed", "records.0.kind"),
        ("batch_time_s", -1.0, "records.0.batch_time_s"),
        ("losses", ["7.6"], "records.0.losses.0"),
        ("speed", 1.0, "records.0.speed"),
        ("machine", None, "records.0.machine"),
    ],
)
def test_a_record_with_a_wrong_value_names_the_place(tmp_path: Path, key: str, value: Any, place: str) -> None:
    path = tmp_path / "records.json"
    write_records(path, [record()])
    content = json.loads(path.read_text())
    content["records"][0][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=f"'{place}'"):
        read_records(path)


def test_the_floating_point_operations_are_those_of_the_published_formula() -> None:
    """96 b s l h^2 (1 + s/6h + V/16lh), Narayanan et al., SC 2021."""
    b, s, layers, h, v = 16384, 512, 48, 4512, 51200
    flops = gpt_flops(batch=b, seq_len=s, layers=layers, hidden=h, vocab=v)
    assert flops == pytest.approx(96 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h)), rel=1e-12)
    without = gpt_flops(batch=b, seq_len=s, layers=layers, hidden=h, vocab=v, recompute=False)
    head = 6 * b * s * h * v
    assert (without - head) / (flops - head) == pytest.approx(3 / 4, rel=1e-12)


# --- spans


def test_spans_survive_the_round_trip(tmp_path: Path) -> None:
    recorder = SpanRecorder(3, clock_offset=0.5)
    for _ in range(2):
        for number, kind in enumerate(SpanKind):
            start, chunk, peer = number / 3, number % 3, number + 10
            recorder.add(
                kind, start, start + 1e-9, microbatch=number, layer=2, direction=number % 2, chunk=chunk, peer=peer
            )
        recorder.step += 1
    recorder.add(SpanKind.OPTIMIZER, 1e9, 1e9 + 1e-6)
    path = tmp_path / "spans.parquet"
    write_spans(path, recorder.spans)
    assert read_spans(path) == recorder.spans
    first, last = read_spans(path)[0], read_spans(path)[-1]
    assert first == Span(3, SpanKind.FORWARD, 0, 0, 2, 0, 0.5, 0.5 + 1e-9, 0, 10)
    assert (last.step, last.microbatch, last.layer, last.direction, last.chunk, last.peer) == (2, -1, -1, -1, -1, -1)
    assert isinstance(last.kind, SpanKind)


def test_spans_of_the_version_before_had_no_sub_shards(tmp_path: Path) -> None:
    path = tmp_path / "spans.parquet"
    spans = [Span(0, SpanKind.FORWARD, 0, 0, 0, -1, 1.0, 2.0)]
    write_spans(path, spans)
    table = pq.read_table(path).drop_columns("shard")
    pq.write_table(table.replace_schema_metadata({"schema": "axonn-spans/2"}), path)
    assert read_spans(path) == spans


def test_no_spans_survive_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "spans.parquet"
    write_spans(path, [])
    assert read_spans(path) == []


def test_a_foreign_span_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spans.parquet"
    with pytest.raises(RecordError, match="is not a span file"):
        read_spans(path)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(RecordError, match="is not a span file"):
        read_spans(path)
    pq.write_table(pa.table({"rank": [1]}), path)
    with pytest.raises(RecordError, match="has schema 'none', expected 'axonn-spans/3'"):
        read_spans(path)
    write_spans(path, [Span(0, "daydream", 0, 0, 0, -1, 1.0, 2.0)])  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="'daydream' is not a valid SpanKind; a later version wrote it"):
        read_spans(path)


# --- breakdown


def span(
    kind: SpanKind,
    start: float,
    end: float,
    *,
    rank: int = 0,
    microbatch: int = 0,
    direction: int = 0,
    chunk: int = 0,
    peer: int = -1,
) -> Span:
    return Span(rank, kind, 0, microbatch, 0, direction, start, end, chunk, peer)


def test_each_instant_belongs_to_one_part_by_priority() -> None:
    spans = [
        span(SpanKind.RECEIVE_WAIT, 0, 10),
        span(SpanKind.TENSOR, 0.5, 9),
        span(SpanKind.ALL_REDUCE, 1, 8),
        span(SpanKind.OPTIMIZER, 2, 6),
        span(SpanKind.COPY, 6, 6.5),
        span(SpanKind.FORWARD, 3, 4),
        span(SpanKind.BACKWARD, 3.5, 5),
    ]
    expected = TimeBreakdown(
        compute=2, optimizer=2.5, all_reduce=2.5, tensor=1.5, point_to_point=0, bubble=1.5, unexplained=0
    )
    assert breakdown(spans) == pytest.approx(expected)
    assert breakdown(spans[::-1]) == pytest.approx(expected)


@pytest.mark.parametrize(("sent", "point_to_point"), [(-1.0, 4.0), (1.0, 4.0), (3.0, 2.0), (5.0, 0.0), (9.0, 0.0)])
def test_waiting_is_split_at_the_time_the_message_was_sent(sent: float, point_to_point: float) -> None:
    """Rank 1 waits from 1 to 5 for what rank 0 sent at `sent`."""
    spans = [
        span(SpanKind.FORWARD, -1, 10),
        span(SpanKind.SEND, sent, sent + 0.5, microbatch=2, chunk=1, peer=1),
        span(SpanKind.SEND, -1, 1, microbatch=1, chunk=1, peer=1),  # another message
        span(SpanKind.SEND, -1, 1, microbatch=2, chunk=1, peer=1, direction=1),  # another direction
        span(SpanKind.SEND, -1, 1, microbatch=2, chunk=0, peer=1),  # to another chunk
        span(SpanKind.SEND, -1, 1, microbatch=2, chunk=1, peer=2),  # to another rank
        span(SpanKind.FORWARD, -1, 1, rank=1),
        span(SpanKind.RECEIVE_WAIT, 1, 5, rank=1, microbatch=2, chunk=1),
        span(SpanKind.FORWARD, 5, 10, rank=1),
    ]
    parts = breakdown(spans)
    assert parts.point_to_point == pytest.approx(point_to_point / 2)
    assert parts.bubble == pytest.approx((4 - point_to_point) / 2)
    assert parts.compute == pytest.approx((11 + 7) / 2)
    assert parts.unexplained == pytest.approx(0)
    nothing_sent = [s for s in spans if s.kind != SpanKind.SEND]
    assert breakdown(nothing_sent).bubble == pytest.approx(4 / 2)


def test_both_halves_of_a_backward_are_compute() -> None:
    spans = [span(SpanKind.BACKWARD_INPUT, 0, 2), span(SpanKind.BACKWARD_WEIGHT, 3, 4)]
    assert breakdown(spans) == pytest.approx(TimeBreakdown(3, 0, 0, 0, 0, 0, 1))


def test_idle_time_is_bubble_and_sends_take_no_time_of_their_own() -> None:
    spans = [span(SpanKind.IDLE, 0, 2), span(SpanKind.SEND, 0, 5, peer=0), span(SpanKind.FORWARD, 4, 5)]
    assert breakdown(spans) == pytest.approx(TimeBreakdown(1, 0, 0, 0, 0, 2, 2))


def test_what_no_span_explains_is_reported() -> None:
    spans = [span(SpanKind.FORWARD, 0, 1), span(SpanKind.BACKWARD, 3, 4), span(SpanKind.FORWARD, 0, 8, rank=1)]
    parts = breakdown(spans)
    assert parts.unexplained == pytest.approx((6 + 0) / 2)
    assert parts.compute == pytest.approx((2 + 8) / 2)
    assert parts.total == pytest.approx(8)


def test_no_spans_cannot_be_broken_down() -> None:
    with pytest.raises(RecordError, match="no spans to break down; was the run traced"):
        breakdown([])


def test_work_with_messages_is_point_to_point_where_nothing_computes() -> None:
    spans = [span(SpanKind.FORWARD, 0, 2), span(SpanKind.MESSAGES, 1, 4), span(SpanKind.RECEIVE_WAIT, 3, 5)]
    parts = breakdown(spans)
    assert (parts.compute, parts.point_to_point, parts.bubble, parts.unexplained) == pytest.approx((2, 2, 1, 0))
