"""Figure 7: its networks, the published ratio that has no seconds, and the bytes that ranks sent here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from axonn.config.train_config import TrainConfig
from axonn.models.unet.unet_config import UNetConfig
from axonn.observability.records import read_records, write_records
from axonn.training.run_outcome import Outcome
from experiments import predictor, runner
from experiments.definition import OURS, ROOT, Experiment, load_experiment, load_model
from experiments.planning import planned_points
from experiments.published_points import published_ratios, published_records
from experiments.runner import points_of
from experiments.validation.published_sets import FOLDER, load_data_set
from plots.figure import make_figure
from plots.figure_records import gather
from plots.figures import fig7
from plots.figures.fig7 import modelled_bytes
from plots.figures.fig7_panels import SCHEME
from plots.summary import rows_of

FIG7 = ROOT / "experiments" / "fig7.yaml"
SIZES = {"unet-3.5b-32px": 3.5, "unet-7b-32px": 7, "unet-14b-32px": 14, "unet-28b-32px": 28}
COUNTED = {
    "1 x 2": {"all": 8, "col": 23429120},
    "2 x 1": {"all": 8, "row": 20712448},
    "1 x 4": {"all": 12, "col": 35143680},
    "2 x 2": {"all": 12, "col": 12468224, "row": 11115520},
    "4 x 1": {"all": 12, "row": 31075584},
}
"""Bytes by axis that ranks counted in real runs of the experiment (`axonn run`), by row x col."""


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return load_experiment(FIG7)


def quickly(model: Any, machine: Any, given: dict[str, Any], *, gpus: int, **rest: Any) -> planned_points.PlannedPoint:
    """A choice without a search."""
    row = given["grid"].get("row", 2)
    grid = {"data": gpus // 4, "row": row, "col": 4 // row}
    whole = planned_points.Strategy.model_validate({**given, "grid": grid, "microbatch_size": 16, "partition": "work"})
    return planned_points.PlannedPoint(strategy=whole, searched=2, fitting=1)


@pytest.fixture(scope="module")
def predictions(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "PREDICTED", tmp_path_factory.mktemp("predicted"))
        patch.setattr(planned_points, "planned", quickly)
        predictor.predict_experiment(experiment, command="test")
        return predictor.predicted_file(experiment)


def fake_supervise(framework: str, config: TrainConfig, folder: Path, **options: object) -> Outcome:
    return Outcome(
        batch_times_s=[5.0] + [0.5 * config.grid.col] * (config.steps - 1),
        losses=[1.0] * config.steps,
        memory_bytes=1,
        bytes_per_batch=COUNTED[f"{config.grid.row} x {config.grid.col}"],
    )


def test_the_networks_follow_one_rule() -> None:
    for name, billions in SIZES.items():
        model = load_model(name)
        assert isinstance(model, UNetConfig)
        assert (model.image_size, model.multipliers, model.blocks, model.attention_levels) == (32, (1, 2, 2, 2), 3, ())
        others = [model.model_copy(update={"width": model.width + step}).parameters for step in (-64, 64)]
        assert all(abs(model.parameters / 1e9 - billions) < abs(n / 1e9 - billions) for n in others)
    _, cases = load_data_set(FOLDER / "poster-unet.yaml")
    assert {case.model for case in cases} == {load_model("unet-28b-32px")}


def test_only_what_the_scheme_is_differs(experiment: Experiment) -> None:
    panel = experiment.predicted
    assert panel is not None
    assert set(panel.planned) == set(panel.frameworks) == {OURS, SCHEME}
    own = {"grid": {"inter": 1, "row": 1}, "overdecomposition": 1, "overlap_input_gradients": False}
    assert panel.frameworks[SCHEME] == panel.frameworks[OURS] | own
    points = {name: [(p.model, p.gpus) for p in panel.points if p.framework == name] for name in panel.frameworks}
    assert points[OURS] == points[SCHEME]
    assert all(not p.strategy for p in panel.points)
    assert panel.frameworks[OURS]["grid"] == {"inter": 1}


def test_the_published_ratio_is_no_time(experiment: Experiment) -> None:
    (ratio,) = published_ratios(experiment)
    assert (ratio.value, ratio.gpus, ratio.faster.model.name) == (2.5, 256, "unet-28b-32px")
    assert published_records(experiment) == []


@pytest.mark.parametrize("grid", COUNTED)
def test_the_model_has_the_bytes_that_ranks_counted(experiment: Experiment, grid: str) -> None:
    assert experiment.runs is not None
    configs = {f"{c.grid.row} x {c.grid.col}": c for c in experiment.runs.configs(where="test").values()}
    assert set(configs) == set(COUNTED)
    assert modelled_bytes(configs[grid]) == COUNTED[grid]


def test_the_figure_from_its_records(
    experiment: Experiment,
    elsewhere: Path,
    predictions: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert make_figure(fig7.FIG7) == 1
    missing = gather(experiment).missing
    assert f"unet-28b-32px-256 {SCHEME} is not predicted; run: axonn predict experiments/fig7.yaml" in missing
    assert "2 x 2 AxoNN is not measured; run: axonn run experiments/fig7.yaml" in missing
    assert len(missing) == 16 + 5
    empty = json.loads((elsewhere / "results" / "fig7" / "summary.json").read_text())
    assert [s["kind"] for s in empty["speedups"]] == ["published"]

    shutil.copy(predictions, predictor.PREDICTED)
    monkeypatch.setattr(runner, "supervise", fake_supervise)
    for point in points_of(experiment):
        runner.run_point(point, command="test")
    assert make_figure(fig7.FIG7) == 0
    summary = json.loads((elsewhere / "results" / "fig7" / "summary.json").read_text())
    assert summary["missing"] == []
    kinds = [row["kind"] for row in summary["rows"]]
    assert (kinds.count("published"), kinds.count("predicted"), kinds.count("measured")) == (0, 16, 5)
    assert {row["framework"] for row in summary["rows"] if row["kind"] == "predicted"} == {OURS, SCHEME}
    assert all(row["published_s"] is None and row["error_pct"] is None for row in summary["rows"])
    assert summary["provenance"]["sources"] == [published_ratios(experiment)[0].source]
    published, *predicted = summary["speedups"]
    assert (published["kind"], published["value"], published["gpus"]) == ("published", 2.5, 256)
    assert not [key for key in published if key.endswith("_s")]
    times = {(r["framework"], r["model"]): r["batch_time_s"] for r in summary["per_gpu"]}
    assert len(predicted) == 8
    for s in predicted:
        assert s["value"] == times[SCHEME, s["model"]] / times[OURS, s["model"]]
        assert (s["published"] is None) == (s["gpus"] != 256)
        if s["gpus"] == 256:
            assert s["error_pct"] == pytest.approx(100 * (s["value"] / 2.5 - 1))
    assert all(r["tensor_bytes"] > 0 and r["sub_shards"] and r["chosen"] for r in summary["per_gpu"])
    assert all(b["agree"] and b["counted"] == b["modelled"] for b in summary["bytes_here"])
    capsys.readouterr()

    files = [elsewhere / "out" / f"fig7.{ending}" for ending in ("png", "svg")]
    before = [f.read_bytes() for f in files]
    make_figure(fig7.FIG7, fresh=True)
    assert [f.read_bytes() for f in files] == before
    assert "differs" not in capsys.readouterr().out

    # One byte that the model has not is seen.
    record_file = next(p.record_file for p in points_of(experiment) if p.label == "2 x 2")
    for path in record_file.parent.glob(f"{record_file.stem[:-1]}*.json"):
        record = read_records(path)[0]
        more = {**record.bytes_per_batch, "row": record.bytes_per_batch["row"] + 1}
        write_records(path, [record.model_copy(update={"bytes_per_batch": more})])
    content = gather(experiment)
    rows = rows_of(content.published, [*content.predicted, *content.measured])
    found = {b["point"]: b["agree"] for b in fig7.extras(content, rows)["bytes_here"]}
    assert found["2 x 2"] is False
    assert sum(found.values()) == 4
