"""The papers' other experiments as small figures: drawn from published, predicted and made-up measured records."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from axonn.config.train_config import TrainConfig
from axonn.training.run_outcome import Outcome
from experiments import runner
from experiments.calibration import measure_machine
from experiments.calibration.machine_description import write_machine
from experiments.definition import ROOT, find_machine, load_experiment
from experiments.predictor import predict_experiment
from experiments.runner import points_of
from plots.figure import FigureKind, make_figure
from plots.figures import ginter, inflight, loss, memory, messages
from plots.report import figure_sections
from tests.helpers.command_line import CommandLine

ALL = {kind.name: kind for kind in (ginter.GINTER, inflight.INFLIGHT, memory.MEMORY, messages.MESSAGES, loss.LOSS)}
PUBLISHED = ROOT / "results" / "published"


@pytest.fixture(autouse=True)
def _not_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_machine, "LOCAL", tmp_path / "local.yaml")


def predict(name: str, *points: str) -> None:
    """All points, or those of these names."""
    experiment = load_experiment(ROOT / "experiments" / f"{name}.yaml")
    panel = experiment.predicted
    if points and panel is not None:
        chosen = [p for p in panel.points if p.name in points]
        assert len(chosen) == len(points)
        experiment = experiment.model_copy(update={"predicted": panel.model_copy(update={"points": chosen})})
    predict_experiment(experiment, command="test")


def measure(name: str, monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    monkeypatch.setattr(runner, "supervise", outcome)
    for point in points_of(load_experiment(ROOT / "experiments" / f"{name}.yaml")):
        runner.run_point(point, command="test")


def drawn(kind: FigureKind, elsewhere: Path) -> tuple[int, dict[str, Any]]:
    """The exit status and the summary; both pictures are there."""
    status = make_figure(kind, fresh=True)
    for ending in ("png", "svg"):
        assert (elsewhere / "out" / f"{kind.name}.{ending}").stat().st_size > 5_000
    return status, json.loads((elsewhere / "results" / kind.name / "summary.json").read_text())


@pytest.mark.parametrize("name", ["inflight", "memory", "loss"])
def test_without_records_the_figure_says_what_is_missing(name: str, elsewhere: Path) -> None:
    status, summary = drawn(ALL[name], elsewhere)
    experiment = load_experiment(ROOT / "experiments" / f"{name}.yaml")
    expected = len(experiment.predicted.points) if experiment.predicted else 0
    assert status == 1
    assert len(summary["missing"]) == expected + len(experiment.runs.runs)
    assert not summary["rows"]


@pytest.mark.parametrize("name", ALL)
def test_each_says_what_it_shows_and_what_differs(name: str) -> None:
    experiment = load_experiment(ROOT / "experiments" / f"{name}.yaml")
    assert experiment.about
    assert experiment.differs
    assert all((ROOT / reading.file).exists() for reading in experiment.readings.values())


def test_pipeline_phases_are_those_of_the_records(elsewhere: Path) -> None:
    predict("ginter")
    status, summary = drawn(ginter.GINTER, elsewhere)
    assert status == 0
    with open(PUBLISHED / "ipdps22_fig5_inter_layer_time.csv", encoding="utf-8") as file:
        published = {int(row["G_inter"]): float(row["time_s"]) for row in csv.DictReader(file)}
    phases = summary["pipeline_phase"]
    assert {p["G_inter"]: p["published_s"] for p in phases} == published
    for phase in phases:
        assert sum(phase["predicted_parts_s"].values()) == pytest.approx(phase["predicted_s"])
        assert all(seconds >= 0 for seconds in phase["predicted_parts_s"].values())
        error = 100 * (phase["predicted_s"] / phase["published_s"] - 1)
        assert phase["error_pct"] == pytest.approx(error)
    before = [(elsewhere / "out" / f"ginter.{ending}").read_bytes() for ending in ("png", "svg")]
    drawn(ginter.GINTER, elsewhere)
    assert [(elsewhere / "out" / f"ginter.{ending}").read_bytes() for ending in ("png", "svg")] == before


def test_memory_is_published_beside_predicted(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(framework: str, config: TrainConfig, folder: Path, **options: object) -> Outcome:
        parts = {"parameters": 2, "gradients": 6, "optimizer_state": 12, "buckets": 0, "host": 0, "activations": 9}
        counted = {part: size * config.model.parameters for part, size in parts.items()}
        return Outcome([1.0] * config.steps, [4.0] * config.steps, memory_parts=counted, memory_of_all=counted)

    predict("memory")
    measure("memory", monkeypatch, fake)
    status, summary = drawn(memory.MEMORY, elsewhere)
    assert status == 0
    assert [x["published_bytes"] for x in summary["memory"]] == pytest.approx([520e9, 130.24e9, 40e9])
    for x in summary["memory"]:
        assert sum(x["predicted_parts"].values()) == x["predicted_bytes"]
        assert abs(x["error_pct"]) < 10
    # What is no model state on the device is not counted as such.
    assert [run["on_device_per_parameter"] for run in summary["allocated"]] == pytest.approx([20.0] * 3)
    # 20 phi against 4 phi + 16 bsize.
    line = summary["over_bsize"][0]
    assert line["without_bytes"] == 20 * line["parameters"]
    assert line["with_bytes"][0] == 4 * line["parameters"] + 16 * line["bsize"][0]


def test_limits_are_held_against_1f1b_on_the_same_work(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(framework: str, config: TrainConfig, folder: Path, **options: object) -> Outcome:
        limit = config.schedule.in_flight_limit
        seconds = 2.0 if limit is None else 2.0 - 0.1 * limit
        kept = {"activations": 100 * (limit or config.grid.inter)}
        return Outcome([seconds] * config.steps, [4.0] * config.steps, memory_parts=kept, memory_of_all=kept)

    predict("inflight", "12B headless 1f1b", "12B headless limit 24", "12B headless limit 36")
    measure("inflight", monkeypatch, fake)
    status, summary = drawn(inflight.INFLIGHT, elsewhere)
    assert status == 1
    assert any("100B 1f1b AxoNN is not predicted" in line for line in summary["missing"])
    measured = {x["limit"]: x for x in summary["limits"] if x["kind"] == "measured"}
    assert {n: x["over_1f1b_pct"] for n, x in measured.items()} == pytest.approx({n: -5.0 * n for n in (1, 2, 3, 4, 8)})
    assert measured[8]["activations_over_1f1b"] == 4
    # Where stages are equal, the published limit falls behind 1F1B and a higher one is ahead, at more activations.
    predicted = {x["limit"]: x for x in summary["limits"] if x["kind"] == "predicted"}
    assert predicted[24]["over_1f1b_pct"] > 0 > predicted[36]["over_1f1b_pct"]
    assert predicted[24]["activations_over_1f1b"] == pytest.approx(1)
    assert predicted[36]["activations_over_1f1b"] == pytest.approx(1.5)
    assert {x["kind"]: x["limit"] for x in summary["same_budget"]} == {"predicted": 24, "measured": 2}


def test_published_messages_without_a_measured_one(
    elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, summary = drawn(messages.MESSAGES, elsewhere)
    assert status == 1
    assert "run: axonn calibrate --quick" in summary["missing"][0]
    assert {s["kind"] for s in summary["series"]} == {"published"}
    with open(PUBLISHED / "ipdps22_fig3_p2p_ms.csv", encoding="utf-8") as file:
        times = [float(row["nccl_inter_ms"]) for row in csv.DictReader(file)]
    of = ("messages", "NCCL", "between two nodes")
    assert [s["ms"] for s in summary["series"] if (s["what"], s["library"], s["where"]) == of] == [times]
    assert any("MPI: up to 32768 bytes faster between two nodes" in line for line in summary["suspect"])
    # Curves of a machine file are the measured ones.
    machine = find_machine("summit")
    write_machine(tmp_path / "local.yaml", machine)
    capsys.readouterr()
    assert make_figure(messages.MESSAGES) == 0
    assert "nothing to do" not in capsys.readouterr().out
    again = json.loads((elsewhere / "results" / "messages" / "summary.json").read_text())
    mine = [s for s in again["series"] if s["kind"] == "measured"]
    assert [(s["what"], s["library"]) for s in mine] == [
        ("messages", "MPI"),
        ("messages", "Gloo"),
        ("all_reduce", "Gloo"),
    ]
    curve = machine.network.p2p["mpi"].intra_node
    assert mine[0]["ms"] == pytest.approx([1e3 * curve.seconds(size) for size in mine[0]["bytes"]])


SUSPECT = {"messages": messages.MESSAGES, "loss": loss.LOSS}


@pytest.mark.parametrize("name", SUSPECT)
def test_every_suspect_point_is_marked_in_figure_table_and_report(
    name: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All figures that call something suspect in what they say of themselves."""
    shipped = [load_experiment(path) for path in sorted((ROOT / "experiments").glob("*.yaml"))]
    assert {e.name for e in shipped if any(line.startswith("Suspect:") for line in e.differs)} == set(SUSPECT)
    _, summary = drawn(SUSPECT[name], elsewhere)
    out = capsys.readouterr().out
    assert summary["suspect"]
    if name == "messages":
        curves = {(s["what"], s["library"], s["where"]): s for s in summary["series"]}
        counts = {of: len(curve["suspect_bytes"]) for of, curve in curves.items()}
        # Messages of MPI between nodes, up to 32 KiB, and the points that stand out.
        mpi = curves["messages", "MPI", "between two nodes"]
        assert {size for size in mpi["bytes"] if size <= 32768} <= set(mpi["suspect_bytes"])
        for line in summary["suspect"]:
            for size in map(int, re.findall(r"at (\d+) bytes", line)):
                assert any(size in curve["suspect_bytes"] for curve in curves.values())
        row = next(line for line in out.splitlines() if "messages, MPI, 2 nodes" in line)
        assert f"{mpi['ms'][0]:.4f} ?" in row
    else:
        curves = summary["published_losses"]
        counts = {label: len(curve["suspect_batches"]) for label, curve in curves.items()}
        assert set(counts.values()) == {1}
        assert [row["batch"] for row in summary["published_apart_pct"] if row["suspect"]] == [0.0]
    # One path with all rings of a curve.
    groups = re.findall(r'<g id="suspect">(.*?)\n   </g>', (elsewhere / "out" / f"{name}.svg").read_text(), re.DOTALL)
    assert [group.count("<use ") for group in groups] == [count for count in counts.values() if count]
    tables = figure_sections.section(name).tables
    assert any("suspect" in heading.text for table in tables for heading in table.headings) or any(
        "suspect" in cell for table in tables for row in table.rows for cell in row
    )


def test_losses_are_compared_with_the_serial_run(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(framework: str, config: TrainConfig, folder: Path, **options: object) -> Outcome:
        factor = 1 + 1e-6 * (config.grid.data - 1)
        return Outcome([1.0] * config.steps, [factor * (5.0 - 0.01 * n) for n in range(config.steps)])

    measure("loss", monkeypatch, fake)
    status, summary = drawn(loss.LOSS, elsewhere)
    assert status == 0
    assert summary["largest_difference"] == {
        "G_col 2": 0.0,
        "G_data 2": pytest.approx(1e-6, rel=1e-3),
        "G_inter 2": 0.0,
        "G_row 2": 0.0,
    }
    first = {label: curve["loss"][0] for label, curve in summary["published_losses"].items()}
    assert first == {"AxoNN": 8.2017, "PyTorch": 6.6275}
    assert summary["published_apart_pct"][0]["difference_pct"] == pytest.approx(100 * (8.2017 / 6.6275 - 1))


def test_nothing_to_predict_or_measure_is_no_error(axonn: CommandLine) -> None:
    path = str(ROOT / "experiments" / "messages.yaml")
    for command, said in (("predict", "nothing to predict"), ("run", "nothing to measure")):
        code, out, _ = axonn(command, path)
        assert code == 0
        assert said in out
