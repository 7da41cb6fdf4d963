"""What all figures share, on one that draws next to nothing: what is gathered, what is missing, when it is redrawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import RenderableType

from axonn.config.train_config import TrainConfig
from axonn.durable_files import locked_folder
from axonn.errors import LaunchError, RecordError
from axonn.observability.records import Failure, Machine, Record, read_records, write_records
from axonn.schedules import ScheduleSpec
from axonn.training.run_outcome import Outcome
from axonn.training.run_record import configuration_of
from experiments import predictor, runner
from experiments.definition import ROOT, Experiment, load_experiment
from experiments.runner import MeasuredPoint, points_of
from plots.figure import FigureKind, load_summary, main, make_figure, summary_file
from plots.figure_records import gather
from plots.summary import here, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plots.figure_records import Content

# An experiment with published, predicted and measured points, each measured three times.
FIG3 = ROOT / "experiments" / "fig3.yaml"


def draw(summary: dict[str, Any], content: Content) -> Figure:
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(3.5, 1))


def tables(summary: dict[str, Any], content: Content) -> Iterable[RenderableType]:
    return [f"{len(summary['rows'])} rows"]


KIND = FigureKind(name="fig3", draw=draw, tables=tables)


def fake_supervise(framework: str, config: TrainConfig, folder: Path, **options: object) -> Outcome:
    return Outcome(batch_times_s=[1.0] * config.steps, losses=[4.0] * config.steps, memory_bytes=1)


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The predicted records, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "PREDICTED", tmp_path_factory.mktemp("predicted"))
        predictor.predict_experiment(load_experiment(FIG3), command="test")
        return predictor.PREDICTED / "fig3.json"


@pytest.fixture
def experiment() -> Experiment:
    return load_experiment(FIG3)


@pytest.fixture
def measured(
    experiment: Experiment, elsewhere: Path, predictions: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[MeasuredPoint, Record]]:
    """Everything is predicted and measured."""
    shutil.copy(predictions, predictor.PREDICTED)
    monkeypatch.setattr(runner, "supervise", fake_supervise)
    return [(p, runner.run_point(p, command="test")) for p in points_of(experiment)]


Measured = list[tuple[MeasuredPoint, Record]]


def change(point: MeasuredPoint, /, **update: Any) -> None:
    (record,) = read_records(point.record_file)
    write_records(point.record_file, [record.model_copy(update=update)])


def with_schema(path: Path, schema: str) -> None:
    path.write_text(path.read_text().replace("axonn-records/1", schema))


# --- what is gathered


def test_all_is_there(experiment: Experiment, measured: Measured) -> None:
    content = gather(experiment)
    assert content.missing == content.failures == []
    assert [len(content.published), len(content.predicted), len(content.measured)] == [2, 2, len(measured)]
    for kind in ("published", "predicted", "measured"):
        assert {r.kind for r in getattr(content, kind)} == {kind}


def test_records_of_another_schema_are_named_and_the_others_drawn(experiment: Experiment, measured: Measured) -> None:
    point = measured[0][0]
    with_schema(point.record_file, "axonn-records/0")
    other, named = gather(experiment).missing
    assert other.startswith(f"{point.record_file}: has schema 'axonn-records/0', expected 'axonn-records/1'; remove it")
    assert named == f"{point.label} AxoNN is measured 2 times of 3; run: axonn run experiments/fig3.yaml"
    with_schema(predictor.predicted_file(experiment), "axonn-records/0")
    content = gather(experiment)
    assert content.predicted == []
    assert len(content.measured) == len(measured) - 1
    assert sum("is not predicted; run: axonn predict experiments/fig3.yaml" in line for line in content.missing) == 2
    assert any(line.startswith(f"{predictor.predicted_file(experiment)}: has schema") for line in content.missing)


def test_a_half_finished_run_is_named(experiment: Experiment, measured: Measured) -> None:
    for point, _ in measured[:-2]:
        point.record_file.unlink()
    labels = list(experiment.runs.runs)
    assert gather(experiment).missing == [
        f"{label} AxoNN is {how}; run: axonn run experiments/fig3.yaml"
        for label, how in zip(labels, ["not measured", "measured 1 times of 3", "measured 1 times of 3"], strict=True)
    ]


@pytest.mark.parametrize("cause", ["dead-rank", "unavailable"])
def test_a_failed_run_is_missing_and_said(
    experiment: Experiment, measured: Measured, cause: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that our engine refuses: no other framework has its place."""
    point = measured[0][0]
    change(point, batch_time_s=None, failure=Failure(cause=cause, detail="the reason"))
    content = gather(experiment)
    assert len(content.failures) == len(content.missing) == 1
    assert make_figure(KIND) == 1
    assert "the reason" in capsys.readouterr().out


def test_what_is_left_of_another_configuration_is_no_repeat_of_this_one(
    experiment: Experiment, measured: Measured
) -> None:
    changed = experiment.runs.configs(where="test")[measured[0][0].label].model_copy(
        update={"schedule": ScheduleSpec(in_flight_limit=1)}
    )
    change(measured[0][0], configuration=configuration_of(changed))
    # Of a run that has another name by now.
    change(measured[1][0], point="as it was called")
    content = gather(experiment)
    assert len(content.measured) == len(measured) - 2
    assert ["is measured 2 times of 3" in line for line in content.missing] == [True, True]


def test_records_of_a_cluster_belong_to_the_points_at_scale(experiment: Experiment, measured: Measured) -> None:
    record, published = measured[0][1], gather(experiment).published[0]
    machine = Machine(name="summit")
    collected = record.model_copy(update={"machine": machine, "point": published.point, "asked": published.asked})
    stray = record.model_copy(update={"machine": machine, "configuration": "of another experiment"})
    write_records(runner.MEASURED / "collected.json", [collected, stray])
    content = gather(experiment)
    assert collected in content.measured
    assert stray not in content.measured
    assert content.missing == []
    rows = rows_of(content.published, content.measured)
    (at_scale,) = [row for row in rows if row["kind"] == "measured" and not here(row)]
    assert at_scale["published_s"] == published.batch_time_s
    assert sum(map(here, rows)) == 3
    # An error is of the same work only.
    other = collected.model_copy(update={"asked": record.asked})
    (row,) = [row for row in rows_of(content.published, [other]) if row["kind"] == "measured"]
    assert row["published_s"] is row["error_pct"] is None


def test_predictions_of_other_inputs_are_named(experiment: Experiment, measured: Measured) -> None:
    path = predictor.predicted_file(experiment)
    write_records(path, [r.model_copy(update={"fingerprint": "another"}) for r in read_records(path)])
    (line,) = gather(experiment).missing
    assert line == ("the predictions are of other inputs than there are now; run: axonn predict experiments/fig3.yaml")


def test_predictions_of_another_schema_are_made_again_and_measurements_kept(
    experiment: Experiment, measured: Measured
) -> None:
    point = measured[0][0]
    assert predictor.done_predictions(experiment) is not None
    assert point.finished_record() is not None
    with_schema(point.record_file, "axonn-records/0")
    with_schema(predictor.predicted_file(experiment), "axonn-records/0")
    assert predictor.done_predictions(experiment) is None
    with pytest.raises(RecordError, match="has schema"):
        point.finished_record()
    write_records(point.record_file, [])
    assert point.finished_record() is None


def test_kinds_are_never_mixed(experiment: Experiment, measured: Measured) -> None:
    point = measured[0][0]
    change(point, kind="predicted")
    path = predictor.predicted_file(experiment)
    first, second = read_records(path)
    write_records(path, [first.model_copy(update={"kind": "measured"}), second])
    content = gather(experiment)
    assert {r.kind for r in content.measured} == {"measured"}
    assert [r.point for r in content.predicted] == [second.point]
    assert f"{path}: {first.point} is measured and lies among the predicted ones; remove it" in content.missing
    assert (
        f"{point.record_file}: {point.label} is predicted and lies among the measured ones; remove it"
        in content.missing
    )


# --- when it is drawn


def test_it_is_drawn_again_when_something_changed(
    measured: Measured, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drawn(**options: bool) -> bool:
        assert make_figure(KIND, **options) == 0
        out = capsys.readouterr().out
        assert "7 rows" in out
        return "nothing to do: the figure is newer than all its records" not in out

    assert drawn()
    assert not drawn()
    assert drawn(fresh=True)
    change(measured[0][0], batch_time_s=2.0)
    assert drawn()
    assert not drawn()
    (elsewhere / "out" / "fig3.svg").unlink()
    assert drawn()
    beside = replace(KIND, outputs=lambda content: [elsewhere / "out" / "beside.json"])
    make_figure(beside)
    assert "nothing to do" not in capsys.readouterr().out


@pytest.mark.parametrize("other", ['{"figure": "fig6", "fingerprint": "FINGERPRINT"}', '{"figure": "fig3"', "[]"])
def test_a_summary_of_another_figure_or_half_a_one_is_none(measured: Measured, other: str) -> None:
    make_figure(KIND)
    path = summary_file("fig3")
    whole = load_summary("fig3")
    assert whole is not None
    path.write_text(other.replace("FINGERPRINT", whole["fingerprint"]))
    assert load_summary("fig3") is None
    make_figure(KIND)
    assert load_summary("fig3") == whole


def test_summary_says_where_everything_is_from(measured: Measured) -> None:
    make_figure(KIND)
    summary = json.loads(summary_file("fig3").read_text())
    assert summary["provenance"]["command"] == "make reproduce-fig3"
    assert summary["provenance"]["records"]["published"] == "ipdps22-fig6"
    assert any("IPDPS 2022" in source for source in summary["provenance"]["sources"])
    assert (summary["policy"]["batches"], summary["policy"]["repeats"]) == (11, 3)
    assert summary["about"]
    assert summary["differs"]
    assert {row["kind"] for row in summary["rows"]} == {"published", "predicted", "measured"}


def test_of_much_that_is_missing_three_are_named_in_the_figure(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(KIND, [])
    assert ended.value.code == 1
    assert capsys.readouterr().out.count("missing: ") == 5
    drawn = (elsewhere / "out" / "fig3.svg").read_text()
    assert "and 2 more" in drawn


def test_a_figure_without_an_experiment_is_an_error(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(FigureKind(name="fig0", draw=draw, tables=tables), [])
    assert ended.value.code == 2
    assert "fig0.yaml" in capsys.readouterr().err


def test_two_runs_of_a_point_do_not_share_its_folder(experiment: Experiment, elsewhere: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(runner, "supervise", fake_supervise)
    point = points_of(experiment)[0]
    with locked_folder(point.folder), pytest.raises(LaunchError, match=r"another run uses .*; wait for its end"):
        runner.run_point(point, command="test")
    assert not point.record_file.exists()
    assert runner.run_point(point, command="test").failure is None
