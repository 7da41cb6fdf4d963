"""`axonn trace` on runs that are whole, half-written, predicted, or not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from axonn.errors import AxonnError, ConfigError, RecordError
from axonn.spans import Span, SpanKind, SpanRecorder, TimeBreakdown, breakdown, overlap
from experiments.definition import ROOT
from plots.trace_command import choose, choose_ranks, find_run, load_steps, trace
from tests.helpers.rank_pool import RankPool
from tests.inter_layer.test_overlap import spans_of_a_step
from tests.observability.test_trace_events import check, load

RANKS = 4


@pytest.fixture(scope="module")
def real(pool: RankPool) -> list[list[Span]]:
    """A real step of 2 x 2 ranks in two sub-shards, by rank."""
    return [spans for spans, _ in pool.run(spans_of_a_step, 2, ranks=RANKS)]


@pytest.fixture
def run(real: list[list[Span]], tmp_path: Path) -> Path:
    """A run folder with this step as batches 0 to 4, in two files each rank."""
    folder = tmp_path / "runs" / "mine"
    for rank, spans in enumerate(real):
        recorder = SpanRecorder(rank, folder=folder / f"spans-{rank}.parquet")
        for first, last in ((0, 2), (2, 5)):
            recorder.spans = [
                s._replace(step=step, start=s.start + 10 * step, end=s.end + 10 * step)
                for step in range(first, last)
                for s in spans
            ]
            recorder.flush()
    spec = {"config": {"grid": {"data": 1, "inter": 1, "row": 2, "col": 2}}}
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder


def test_a_real_run_says_its_sub_shards(real: list[list[Span]]) -> None:
    for spans in real:
        inside = [s for s in spans if s.kind in (SpanKind.FORWARD, SpanKind.BACKWARD, SpanKind.TENSOR)]
        assert {s.shard for s in inside} == {0, 1}
        assert {s.shard for s in spans if s not in inside} <= {-1}
        # A sub-shard computes up to its collective, which begins while it does.
        for collective in (s for s in inside if s.kind == SpanKind.TENSOR):
            assert any(
                s.shard == collective.shard and s.start <= collective.start <= s.end
                for s in inside
                if s.kind != SpanKind.TENSOR
            )


def test_the_picture_the_trace_and_the_breakdown(
    run: Path, real: list[list[Span]], capsys: pytest.CaptureFixture[str]
) -> None:
    trace(run, ranks="0,3")
    out = capsys.readouterr().out
    assert {p.name for p in run.iterdir()} >= {"timeline.png", "timeline.svg", "trace.json"}
    spans = [s for own in real for s in own]
    events = load(run / "trace.json")
    check(events, [s for s in spans for _ in range(5)])
    named = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert named[3] == "rank 3 (row 1, col 1), measured"
    share = overlap(spans)
    words = f"{share.hidden_share:.0%} of {share.collective:.3g} s"
    assert words in out
    # A batch in the middle, after the first.
    svg = (run / "timeline.svg").read_text()
    assert "mine: batch 3, measured" in svg
    assert "2 of 4 ranks; numbers in bars: microbatch" in svg
    assert f"batch 3 of 0 to 4, all its ranks: hidden of the collectives along row and col: {words}" in svg
    parts = breakdown(spans)
    assert sum(parts) == pytest.approx(max(s.end for s in spans) - min(s.start for s in spans))
    rows = dict(line.split()[:2] for line in out.splitlines() if line.strip().startswith(TimeBreakdown._fields[:1]))
    assert float(rows["compute"]) == pytest.approx(parts.compute, abs=1e-4)


def test_one_batch_goes_elsewhere(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace(run, out=tmp_path / "out", step=1, from_ms=0.1, compress=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["timeline.png", "timeline.svg", "trace.json.gz"]
    steps = {e["args"]["step"] for e in load(tmp_path / "out" / "trace.json.gz") if e["ph"] == "X"}
    assert steps == {1}
    assert "trace.json.gz" in capsys.readouterr().out


def test_what_is_whole_of_a_run_that_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run / "spans-2.parquet" / "00000002.parquet"
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    assert list(load_steps(find_run(run), None)) == [0, 1]
    out = capsys.readouterr().out
    assert "00000002.parquet: is not a span file" in out
    assert "not all ranks have spans of batches 2, 3, 4" in out
    newest.unlink()
    assert list(load_steps(find_run(run), None)) == [0, 1]
    (newest.parent / "00000000.parquet").unlink()
    with pytest.raises(RecordError, match=r"rank 2 of 4 have no spans yet"):
        load_steps(find_run(run), None)


def test_a_rank_that_has_not_begun_is_missed(run: Path) -> None:
    for file in (run / "spans-3.parquet").iterdir():
        file.unlink()
    with pytest.raises(RecordError, match=r"rank 3 of 4"):
        load_steps(find_run(run), None)


def test_what_is_not_there_is_said(run: Path, tmp_path: Path) -> None:
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: find_run(run.parent / "mime"), r"no such run; did you mean .*mine\?"),
        (lambda: find_run(run.parent / "other"), r"no such run; in .*runs are mine"),
        (lambda: find_run(run.parent), r"holds several runs; name one of .*mine"),
        (lambda: find_run(run / "spans-0.parquet"), r"there are no spans in it"),
        (lambda: find_run(run / "spec.json"), r"expected 'axonn-records/1'"),
        (lambda: choose([0, 1], step=7, first=False, last=False, warmup=1), "batch 7 was not traced; .* 0 to 1"),
        (lambda: choose([0, 1], step=1, first=True, last=False, warmup=1), "give one"),
        (lambda: choose_ranks("1,x", [0, 1]), "'x' is no rank"),
        (lambda: choose_ranks("1-3", [0, 1]), "ranks 0 to 1"),
        (lambda: trace(run, from_ms=1e9), "goes from 0 to"),
    ]
    for call, message in refused:
        with pytest.raises((RecordError, ConfigError), match=message):
            call()
    assert not (run / "trace.json").exists()
    assert choose_ranks("2,0-1", [0, 1, 2]) == (2, 0, 1)
    assert choose(range(8), step=None, first=False, last=False, warmup=3) == 5
    assert choose(range(8), step=None, first=False, last=True, warmup=3) == 7


def test_it_is_a_command_once_installed() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["axonn.commands"]["trace"].split(":")
    assert (module, name) == (trace.__module__, trace.__name__)
    # Its errors become one message in cli.main(), and its arguments are those of a command.
    assert issubclass(RecordError, AxonnError)
    app = typer.Typer()
    app.command()(trace)
    names = {option for p in typer.main.get_command(app).params for option in p.opts}
    assert {"run", "--out", "--step", "--first", "--last", "--ranks"} <= names
