"""Figure 5 from predictions and made-up runs: shares agree with the records, redrawing changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from axonn.config.train_config import TrainConfig
from axonn.grid import ProcessGrid
from axonn.models.registry import outline_of
from axonn.spans import Overlap, SpanKind, SpanRecorder, overlap, read_spans, span_files
from axonn.training.run_outcome import Outcome
from experiments import predictor, runner
from experiments.definition import ROOT, Experiment, load_experiment, load_model
from experiments.runner import points_of
from plots.figure import make_figure
from plots.figure_records import gather
from plots.figures import fig5
from tests.helpers.tensor_volume import best_tensor_grid, widths_of

FIG5 = ROOT / "experiments" / "fig5.yaml"


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return load_experiment(FIG5)


def fake_supervise(framework: str, config: TrainConfig, folder: Path, **options: object) -> Outcome:
    """A run of which half of each collective is hidden with two sub-shards, and nothing with one."""
    lanes = config.overdecomposition or 1
    for rank in range(2):
        spans = SpanRecorder(rank, folder=folder / f"spans-{rank}.parquet")
        for step in range(config.steps):
            spans.step = step
            for lane in range(lanes):
                at = 10.0 * step + lane
                task = {"microbatch": 0, "layer": 0, "chunk": 0, "shard": lane if lanes > 1 else -1}
                spans.add(SpanKind.FORWARD, at, at + 1, **task)
                spans.add(SpanKind.TENSOR, at + 1, at + 2, **task)
            spans.add(SpanKind.BACKWARD, 10.0 * step + lanes + 1, 10.0 * step + lanes + 2, microbatch=0, chunk=0)
        spans.flush()
    return Outcome(batch_times_s=[9.0] * config.steps, losses=[4.0] * config.steps, memory_bytes=1)


def test_predicted_spans_say_sub_shard_and_layer(elsewhere: Path, experiment: Experiment) -> None:
    records = predictor.predict_experiment(experiment, command="test")
    two, one, wide = records
    assert (two.ran.grid.row, two.ran.grid.col, wide.ran.grid.row) == (2, 4, 1)
    assert all(r.note is None for r in records), "a point does not fit into the memory that the figure says"
    spans = [s for f in span_files(Path(str(two.run_folder)) / "spans-0.parquet") for s in read_spans(f)]
    assert Overlap(**two.overlap_s) == pytest.approx(overlap(spans))
    hidden = [Overlap(**r.overlap_s).hidden_share for r in (two, one)]
    assert hidden[0] > 2 * hidden[1]
    names = fig5.layer_names(load_model("gpt-10b"))
    assert (len(names), names[1], names[2], names[64]) == (64, "1A", "1M", "32M")
    forward = [s for s in spans if s.kind == SpanKind.FORWARD]
    # Turns alternate as long as both have something to compute, and layers follow each other.
    assert [s.shard for s in forward[:100]] == [0, 1] * 50
    assert [s.layer for s in forward if s.shard == 0] == sorted(s.layer for s in forward if s.shard == 0)
    backward = [s.layer for s in spans if s.kind == SpanKind.BACKWARD and s.shard == 0]
    turn = backward.index(65)
    assert backward[:turn] == sorted(backward[:turn])
    assert backward[turn:] == sorted(backward[turn:], reverse=True)
    before, after = fig5.windows(spans, names)
    assert before.end <= min(s.start for s in spans if s.kind == SpanKind.BACKWARD) < after.begin
    shown = {names[s.layer] for s in before.of(spans, 0) if s.kind == SpanKind.FORWARD}
    assert shown == {"16A", "16M", "17A", "17M"}


def test_the_figure_says_what_the_spans_say(
    elsewhere: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without anything it names every point, and draws all the same.
    assert make_figure(fig5.FIG5) == 1
    assert "gpt-10b 2x4, 2 sub-shards AxoNN is not predicted" in capsys.readouterr().out
    predictor.predict_experiment(experiment, command="test")
    monkeypatch.setattr(runner, "supervise", fake_supervise)
    for point in points_of(experiment):
        runner.run_point(point, command="test")
    assert make_figure(fig5.FIG5) == 0
    files = [elsewhere / "out" / name for name in ("fig5.png", "fig5.svg")]
    traces = [elsewhere / "out" / f"fig5-{kind}.trace.json" for kind in ("predicted", "measured")]
    first = [path.read_bytes() for path in (*files, *traces)]
    assert make_figure(fig5.FIG5, fresh=True) == 0
    assert [path.read_bytes() for path in (*files, *traces)] == first
    summary = json.loads((elsewhere / "results" / "fig5" / "summary.json").read_text())
    shares = {row["point"]: row for row in summary["overlap"]}
    assert [row["kind"] for row in summary["overlap"]] == ["predicted"] * 3 + ["measured"] * 2
    measured = shares["gpt-4x384 1x2, 2 sub-shards"]
    assert measured["hidden_share"] == pytest.approx(0.5)
    assert shares["gpt-4x384 1x2, 1 sub-shard"]["hidden_share"] == 0
    for row in summary["rows"]:
        assert shares[row["point"]]["hidden"] == pytest.approx(row["overlap_s"]["hidden"])
    # The words in the picture are those of the spans.
    svg = files[1].read_text()
    assert "Predicted: GPT 10B" in svg
    assert "Measured: gpt-4x384" in svg
    for point in ("gpt-10b 2x4, 2 sub-shards", "gpt-4x384 1x2, 2 sub-shards"):
        row = shares[point]
        assert f"{row['hidden_share']:.0%} of {row['collective']:.3g} s" in svg
    named = [e["args"]["name"] for e in json.loads(traces[1].read_text())["traceEvents"] if e["name"] == "process_name"]
    assert len(named) == 4
    assert all(name.startswith("measured, gpt-4x384") for name in named)
    # Spans that are not those of the record are not drawn.
    spoilt = Path(str(runner.RUNS / points_of(experiment)[0].name))
    for rank in range(2):
        for file in (spoilt / f"spans-{rank}.parquet").iterdir():
            recorder = SpanRecorder(rank, folder=file.parent)
            recorder.spans = [s._replace(end=s.end + 0.1) for s in read_spans(file)]
            recorder.flush()
    content = gather(load_experiment(FIG5))
    assert content.missing == []
    (line,) = fig5.lacks(content)
    assert line.startswith("gpt-4x384 1x2, 2 sub-shards:")
    assert "are not those of its record" in line


def test_published_facts_of_the_model() -> None:
    model = load_model("gpt-10b")
    assert model.parameters == pytest.approx(10e9, rel=0.05)


def test_the_grid_is_that_of_the_volume_rule() -> None:
    widths = widths_of(outline_of(load_model("gpt-10b")), recompute=True)
    assert best_tensor_grid(widths, 8) == (2, 4)
    sent = [widths.sent(ProcessGrid(row=row, col=8 // row), 1) for row in (2, 1)]
    assert sent[0] / sent[1] == pytest.approx(0.88, abs=0.005)
