"""What a run writes while it trains, and what is read of it meanwhile: spans, rows of metrics, progress."""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from axonn.cli.training_progress import TrainingProgress
from axonn.spans import SpanKind, SpanRecorder, read_spans, span_files
from axonn.training.metrics import BATCHES, EVALUATIONS, Tail, cut_rows

# --- spans and metrics


def test_spans_are_moved_to_files_that_a_crash_leaves_whole(tmp_path: Path) -> None:
    recorder = SpanRecorder(1, folder=tmp_path / "spans-1.parquet")
    assert not recorder.flush()
    for step in range(6):
        recorder.step = step
        recorder.add(SpanKind.FORWARD, step, step + 1.0, microbatch=step)
        recorder.recording = False
        recorder.add(SpanKind.BACKWARD, step, step + 1.0)
        recorder.recording = True
        assert recorder.flush(at_least=2) == (step % 2 == 1)
    assert recorder.spans == []
    (tmp_path / "spans-1.parquet" / ".00000006.parquet.77").write_text("half a file")
    spans = read_spans(tmp_path / "spans-1.parquet")
    assert [(s.step, s.kind, s.microbatch) for s in spans] == [(i, SpanKind.FORWARD, i) for i in range(6)]
    names = {first: [p.stem for p in span_files(tmp_path / "spans-1.parquet", first_step=first)] for first in (0, 3, 9)}
    assert names[0] == ["00000000", "00000002", "00000004"]
    assert names[3] == ["00000002", "00000004"]
    assert names[9] == ["00000004"]
    assert span_files(tmp_path / "none") == []


@given(st.lists(st.binary(min_size=0, max_size=9).map(lambda b: b.hex()), max_size=9), st.data())
def test_a_growing_file_is_read_line_by_line(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("tail") / "rows.jsonl"
    tail = Tail(path)
    assert tail.new() == []
    text = "".join(json.dumps({"v": value}) + "\n" for value in values)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    read = []
    with open(path, "a") as file:
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            file.write(text[start:stop])
            file.flush()
            read += tail.new()
    assert [row["v"] for row in read] == values


def test_rows_are_cut_and_half_a_line_with_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"ste')
    cut_rows(path, lambda row: row["step"] < 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    assert os.listdir(tmp_path) == ["rows.jsonl"]
    cut_rows(tmp_path / "none", lambda row: True)
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_progress_off_a_terminal_is_plain_lines(tmp_path: Path) -> None:
    out = StringIO()
    row = {"step": 0, "loss": 2.5, "seconds": 0.5, "tokens_per_s": 2000.0, "tflops_per_gpu": 0.5}
    with TrainingProgress(Console(file=out, width=40), tmp_path, first=0, steps=100) as progress:
        progress(0)
        with open(tmp_path / BATCHES, "a") as file:
            file.write(json.dumps(row) + "\n")
        progress(1)
        with open(tmp_path / BATCHES, "a") as file:
            file.write((json.dumps(row) + "\n") * 99)
        (tmp_path / EVALUATIONS).write_text(json.dumps({"batches": 40, "loss": 2.25, "seconds": 1.0}) + "\n")
        progress(100)
    first, last = out.getvalue().splitlines()
    assert first == "batch 1/100: loss 2.5000, 2,000 tokens/s, 0.5 TFLOP/s per device, 0:00:50 left"
    assert last.endswith("0:00:00 left, held out 2.2500 after 40")


def test_progress_on_a_terminal_is_a_bar(tmp_path: Path) -> None:
    out = StringIO()
    row = {"step": 0, "loss": 2.5, "seconds": 0.5, "tokens_per_s": 2000.0, "tflops_per_gpu": 0.5}
    (tmp_path / BATCHES).write_text((json.dumps(row) + "\n") * 3)
    console = Console(file=out, width=200, force_terminal=True)
    with TrainingProgress(console, tmp_path, first=0, steps=3) as progress:
        progress(3)
    assert "loss 2.5000, 2,000 tokens/s" in out.getvalue()
    assert "3/3" in out.getvalue()
