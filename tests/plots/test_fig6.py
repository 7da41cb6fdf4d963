"""The figure end to end on made-up measurements, and what a user meets on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from axonn.config.train_config import TrainConfig
from axonn.errors import ConfigError
from axonn.observability.records import Failure, Record, read_records, write_records
from axonn.training.framework import load_framework
from axonn.training.run_outcome import Outcome
from baselines.adapters.pytorch.pytorch_pipelining import TorchPipelining
from experiments import predictor, runner
from experiments.definition import ROOT, Experiment, load_experiment, measured_configs
from experiments.runner import MeasuredPoint, compare_losses, points_of
from plots.figure import make_figure
from plots.figures import fig6
from plots.summary import not_run, rows_of, wrong_orders

FIG6 = ROOT / "experiments" / "fig6.yaml"


@pytest.fixture
def experiment() -> Experiment:
    """With the frameworks that are everywhere."""
    found = load_experiment(FIG6)
    here = [name for name in found.measured.frameworks if name.startswith(("axonn", "pytorch"))]
    assert len(here) == 2
    return found.model_copy(update={"measured": found.measured.model_copy(update={"frameworks": here})})


def test_the_measured_panel_knows_all_its_frameworks() -> None:
    names = load_experiment(FIG6).measured.frameworks
    assert len({load_framework(name).label for name in names}) == len(names) == 5


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The predicted records, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "PREDICTED", tmp_path_factory.mktemp("predicted"))
        predictor.predict_experiment(load_experiment(FIG6), command="test")
        return predictor.PREDICTED / "fig6.json"


def fake_supervise(framework: str, config: TrainConfig, folder: Path, **options: object) -> Outcome:
    """A run that took as long as its name, in no time."""
    seconds = 1.0 if framework == "axonn" else 1.25
    return Outcome(batch_times_s=[5.0] + [seconds] * (config.steps - 1), losses=[4.0] * config.steps, memory_bytes=1)


def measure(experiment: Experiment) -> list[tuple[MeasuredPoint, Record]]:
    return [(p, runner.run_point(p, command="test")) for p in points_of(experiment)]


def test_the_figure_from_its_records(
    experiment: Experiment,
    elsewhere: Path,
    predictions: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert make_figure(fig6.FIG6) == 1
    out = capsys.readouterr().out
    assert "gpt-12b-48 AxoNN is not predicted; run: axonn predict experiments/fig6.yaml" in out
    assert "nothing to do" not in out
    shutil.copy(predictions, predictor.PREDICTED)
    monkeypatch.setattr(runner, "supervise", fake_supervise)
    ran = {record.ran.framework: record.ran.schedule for _, record in measure(experiment)}
    assert {name: schedule and schedule.name for name, schedule in ran.items()} == {
        "AxoNN": "message-driven",
        "PyTorch 1F1B": "1f1b",
    }
    missing = make_figure(fig6.FIG6)
    # Only the frameworks of the fixture were measured.
    assert missing == 1
    for name in ("fig6.png", "fig6.svg"):
        assert (elsewhere / "out" / name).stat().st_size > 10_000
    summary = json.loads((elsewhere / "results" / "fig6" / "summary.json").read_text())
    kinds = [row["kind"] for row in summary["rows"]]
    assert (kinds.count("published"), kinds.count("predicted")) == (12, 12)
    # One row per rank count and framework: the first batch is left out of the time, the repeats are one median.
    measured = [row for row in summary["rows"] if row["kind"] == "measured"]
    assert {(r["framework"], r["batch_time_s"]) for r in measured} == {("AxoNN", 1.0), ("PyTorch 1F1B", 1.25)}
    assert all(len(r["repeats_s"]) == experiment.measured.repeats for r in measured)
    assert summary["mape_pct"]["predicted"]["all"] <= 10
    assert summary["naive"]["mape_pct"] > summary["mape_pct"]["predicted"]["all"]
    assert summary["wrong_orders"] == {"predicted": [], "measured": []}
    assert "nothing to do" not in capsys.readouterr().out
    make_figure(fig6.FIG6)
    assert "nothing to do" in capsys.readouterr().out


def test_done_points_are_kept_and_changed_ones_are_not(
    experiment: Experiment, elsewhere: Path, predictions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "supervise", fake_supervise)
    measure(experiment)
    assert all(p.finished_record() is not None for p in points_of(experiment))
    panel = experiment.measured.model_copy(update={"seed": 1})
    changed = experiment.model_copy(update={"measured": panel})
    assert all(p.finished_record() is None for p in points_of(changed))
    shutil.copy(predictions, predictor.PREDICTED)
    assert predictor.done_predictions(experiment) == read_records(predictions)
    other = experiment.predicted.model_copy(update={"batch_size": 8192})
    assert predictor.done_predictions(experiment.model_copy(update={"predicted": other})) is None


def test_a_failed_point_is_a_record_and_is_run_again(
    experiment: Experiment, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = Failure(cause="dead-rank", rank=1, detail="rank 1 was killed by SIGKILL")
    monkeypatch.setattr(
        runner, "supervise", lambda *a, **k: Outcome(batch_times_s=[1.0, 2.0], losses=[4.0, 3.0], failure=failure)
    )
    point, record = measure(experiment)[0]
    assert read_records(point.record_file) == [record]
    assert (record.failure, record.batch_time_s, record.losses) == (failure, None, [4.0, 3.0])
    assert point.finished_record() is None


def test_a_framework_that_cannot_run_is_said_and_stops_nobody(
    experiment: Experiment, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "supervise", fake_supervise)
    monkeypatch.setattr(TorchPipelining, "unavailable", lambda self, config: "it is too late")
    measured = measure(experiment)
    refused = [record for point, record in measured if point.framework == "pytorch/1f1b"]
    assert {record.failure and record.failure.cause for record in refused} == {"unavailable"}
    assert all(record.failure is None for point, record in measured if point.framework == "axonn")
    ranks = ", ".join(map(str, sorted({p.ranks for p, _ in measured})))
    (line,) = not_run([record for point, record in measured if point.framework == "pytorch/1f1b"])
    assert line == f"not run: PyTorch 1F1B on {ranks} rank(s): it is too late"
    assert compare_losses(measured, experiment.measured.loss_tolerance) == []


def test_different_losses_make_a_failure_not_a_time(
    experiment: Experiment, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "supervise", fake_supervise)
    measured = measure(experiment)
    tolerance = experiment.measured.loss_tolerance
    assert compare_losses(measured, tolerance) == []
    point, record = measured[-1]
    off = record.model_copy(update={"losses": [*record.losses[:-1], record.losses[-1] * (1 + 2 * tolerance)]})
    (failed,) = compare_losses([*measured[:-1], (point, off)], tolerance)
    assert failed.failure is not None
    assert failed.failure.cause == "not-comparable"
    assert failed.batch_time_s is None
    assert read_records(point.record_file) == [failed]


def test_collected_cluster_records_are_drawn_beside_the_published(elsewhere: Path, predictions: Path) -> None:
    published = read_records(ROOT / "results" / "published" / "fig6.json")
    collected = [
        r.model_copy(update={"kind": "measured", "batch_time_s": 1.1 * (r.batch_time_s or 0.0)}) for r in published
    ]
    shutil.copy(predictions, predictor.PREDICTED)
    write_records(elsewhere / "results" / "measured" / "cluster.json", collected)
    make_figure(fig6.FIG6)
    summary = json.loads((elsewhere / "results" / "fig6" / "summary.json").read_text())
    assert summary["mape_pct"]["measured"]["all"] == pytest.approx(10)


def test_wrong_orders_are_found() -> None:
    published = read_records(ROOT / "results" / "published" / "fig6.json")
    swapped = [
        r.model_copy(update={"kind": "predicted", "batch_time_s": 1000.0 - (r.batch_time_s or 0.0)}) for r in published
    ]
    found = wrong_orders(rows_of(published, swapped), "predicted")
    # Three pairs at each of four sizes; DeepSpeed and Megatron-LM are published equal at the smallest.
    assert len(found) == 11


def test_work_grows_with_the_ranks_and_the_batch_does_not(experiment: Experiment) -> None:
    panel = experiment.measured.model_copy(update={"max_ranks": 6})
    configs = measured_configs(panel)
    assert [c.grid.inter for c in configs] == [1, 2, 4]
    assert [c.model.layers for c in configs] == [panel.layers_per_rank * n for n in (1, 2, 4)]
    assert {c.batch_size for c in configs} == {panel.microbatch_size * 16}


def test_a_misspelt_strategy_names_file_point_and_key(tmp_path: Path) -> None:
    path = tmp_path / "fig6.yaml"
    path.write_text(
        FIG6.read_text().replace("microbatch_size: 8, grid: {inter: 6", "microbatchsize: 8, grid: {inter: 6")
    )
    with pytest.raises(
        ConfigError, match=r"fig6.yaml: AxoNN gpt-12b: unknown key 'microbatchsize'; did you mean 'micro"
    ):
        load_experiment(path)
