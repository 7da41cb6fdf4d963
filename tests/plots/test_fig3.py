"""Figure 3 from made-up measurements: every bar adds up, kinds stay apart, and what is missing is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from axonn.config.train_config import TrainConfig
from axonn.observability.records import Failure, Record, read_records, write_records
from axonn.spans import SpanKind, SpanRecorder
from axonn.training.run_outcome import Outcome
from experiments import predictor, runner
from experiments.definition import ROOT, Experiment, load_experiment
from experiments.runner import MeasuredPoint, points_of
from plots.figure import make_figure, summarise
from plots.figure_records import gather
from plots.figures import fig3

FIG3 = ROOT / "experiments" / "fig3.yaml"
FILES = ("fig3.png", "fig3.svg")


@pytest.fixture
def experiment() -> Experiment:
    return load_experiment(FIG3)


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The predicted records, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "PREDICTED", tmp_path_factory.mktemp("predicted"))
        predictor.predict_experiment(load_experiment(FIG3), command="test")
        return predictor.PREDICTED / "fig3.json"


def fake_supervise(framework: str, config: TrainConfig, folder: Path, **options: object) -> Outcome:
    """A run of 2 ranks whose batches take a second: 0.5 forward, 0.25 bubble, 0.125 all-reduce, 0.1 optimizer, and
    the rest is nobody's."""
    parts = [(SpanKind.FORWARD, 0.5), (SpanKind.IDLE, 0.25), (SpanKind.ALL_REDUCE, 0.125), (SpanKind.OPTIMIZER, 0.1)]
    for rank in range(2):
        recorder = SpanRecorder(rank, folder=folder / f"spans-{rank}.parquet")
        for step in range(config.steps):
            recorder.step, now = step, float(step)
            for kind, seconds in parts:
                recorder.add(kind, now, now + seconds)
                now += seconds
        recorder.flush()
    return Outcome(batch_times_s=[5.0] + [1.0] * (config.steps - 1), losses=[4.0] * config.steps, memory_bytes=1)


@pytest.fixture
def measured(
    experiment: Experiment, elsewhere: Path, predictions: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[MeasuredPoint, Record]]:
    """Everything is predicted and measured."""
    shutil.copy(predictions, predictor.PREDICTED)
    monkeypatch.setattr(runner, "supervise", fake_supervise)
    return [(p, runner.run_point(p, command="test")) for p in points_of(experiment)]


def summary_of(elsewhere: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((elsewhere / "results" / "fig3" / "summary.json").read_text())
    return found


def test_every_bar_adds_up(
    experiment: Experiment,
    measured: list[tuple[MeasuredPoint, Record]],
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert make_figure(fig3.FIG3) == 0
    assert all((elsewhere / "out" / name).stat().st_size > 10_000 for name in FILES)
    summary = summary_of(elsewhere)
    assert summary["missing"] == summary["failures"] == []
    bars = summary["parts"]
    assert [(b["point"], b["kind"]) for b in bars] == [(r["point"], r["kind"]) for r in summary["rows"]]
    kinds = [b["kind"] for b in bars]
    assert [kinds.count(k) for k in ("published", "predicted", "measured")] == [2, 2, len(experiment.runs.runs)]
    for bar, row in zip(bars, summary["rows"], strict=True):
        assert sum(bar["parts"].values()) == pytest.approx(bar["bar_s"]) == pytest.approx(row["batch_time_s"])
        inside = bar["parts"].keys() & {"inter_layer", "compute", "point_to_point", "bubble"}
        if bar["kind"] != "measured":
            # What no phase has is next to nothing; the published pipeline is one block.
            assert abs(bar["parts"]["unexplained"]) < 0.001 * bar["bar_s"]
            assert sum(bar["parts"][name] for name in inside) == pytest.approx(row["phases_s"]["inter_layer"])
            assert (inside == {"inter_layer"}) == (bar["kind"] == "published")
        else:
            assert bar["parts"] == pytest.approx(
                {"compute": 0.5, "bubble": 0.25, "all_reduce": 0.125, "optimizer": 0.1, "unexplained": 0.025}
            )
            assert row["phases_s"] == pytest.approx({"inter_layer": 0.5, "all_reduce": 0.125, "optimizer": 0.1})
    assert set(summary["unexplained_pct"]) == set(experiment.runs.runs)
    assert all(share == pytest.approx(2.5) for share in summary["unexplained_pct"].values())
    out = capsys.readouterr().out
    assert "unexplained" in out
    assert "nothing to do" not in out


def test_published_phases_are_those_of_the_table_and_errors_are_against_them(
    experiment: Experiment, measured: list[tuple[MeasuredPoint, Record]]
) -> None:
    summary = summarise(fig3.FIG3, gather(experiment))
    lines = (ROOT / "results/published/ipdps22_fig6_breakdown.csv").read_text().splitlines()[1:]
    table = [[float(cell) for cell in line.split(",")[1:]] for line in lines]
    published = [r for r in summary["rows"] if r["kind"] == "published"]
    assert [[*r["phases_s"].values(), r["batch_time_s"]] for r in published] == [pytest.approx(row) for row in table]
    predicted = {r["point"]: r for r in summary["rows"] if r["kind"] == "predicted"}
    for row in published:
        errors = summary["phase_errors_pct"][row["point"]]
        for phase, seconds in row["phases_s"].items():
            assert seconds * (1 + errors[phase] / 100) == pytest.approx(predicted[row["point"]]["phases_s"][phase])
            # The bound of the data set.
            assert abs(errors[phase]) <= 10


def test_redrawn_it_is_the_same_to_the_byte(measured: list[tuple[MeasuredPoint, Record]], elsewhere: Path) -> None:
    make_figure(fig3.FIG3)
    first = [(elsewhere / "out" / name).read_bytes() for name in FILES]
    make_figure(fig3.FIG3, fresh=True)
    assert [(elsewhere / "out" / name).read_bytes() for name in FILES] == first


def test_missing_and_failed_runs_are_named_in_the_figure(
    measured: list[tuple[MeasuredPoint, Record]], elsewhere: Path
) -> None:
    (gone, _), (failing, record), *_ = measured
    gone.record_file.unlink()
    failure = Failure(cause="dead-rank", rank=1, detail="rank 1 was killed by SIGKILL")
    write_records(failing.record_file, [record.model_copy(update={"batch_time_s": None, "failure": failure})])
    assert make_figure(fig3.FIG3) == 1
    summary = summary_of(elsewhere)
    assert summary["missing"] == [
        f"{point.label} AxoNN is measured 2 times of 3; run: axonn run experiments/fig3.yaml"
        for point in (gone, failing)
    ]
    drawn = (elsewhere / "out" / "fig3.svg").read_text()
    assert all(f"missing: {point.label} AxoNN is measured 2 times of 3" in drawn for point in (gone, failing))
    for point, _ in measured:
        point.record_file.unlink(missing_ok=True)
    assert make_figure(fig3.FIG3) == 1
    assert [b["kind"] for b in summary_of(elsewhere)["parts"]] == ["published"] * 2 + ["predicted"] * 2
    assert "not measured on this machine" in (elsewhere / "out" / "fig3.svg").read_text()


def test_a_predicted_record_among_the_measured_is_not_drawn(
    measured: list[tuple[MeasuredPoint, Record]], elsewhere: Path
) -> None:
    point = measured[0][0]
    (record,) = read_records(point.record_file)
    write_records(point.record_file, [record.model_copy(update={"kind": "predicted", "batch_time_s": 77.0})])
    assert make_figure(fig3.FIG3) == 1
    summary = summary_of(elsewhere)
    assert 77.0 not in [b["bar_s"] for b in summary["parts"]]
    assert any(
        f"{point.label} is predicted and lies among the measured ones; remove it" in m for m in summary["missing"]
    )
    (row,) = [r for r in summary["rows"] if r["point"] == point.label]
    assert (row["kind"], row["repeats_s"]) == ("measured", [1.0, 1.0])


def test_a_run_without_spans_is_one_block(experiment: Experiment, measured: list[tuple[MeasuredPoint, Record]]) -> None:
    for point, record in measured:
        write_records(point.record_file, [record.model_copy(update={"parts_s": {}, "phases_s": {}})])
    summary = summarise(fig3.FIG3, gather(experiment))
    bars = [b for b in summary["parts"] if b["kind"] == "measured"]
    assert all(b["parts"] == {"undivided": 1.0} for b in bars)
