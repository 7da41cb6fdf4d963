"""Points that a busy machine measured: marked in every figure and table that shows them, left out of ratios, named at
the end with what to do. On made-up readings; `tests/observability/test_usage.py` has real ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from axonn.config.train_config import TrainConfig
from axonn.observability.machine_usage import BatchUsage
from axonn.observability.records import Failure, read_all, read_records, write_records
from axonn.training.run_outcome import Outcome
from experiments import runner
from experiments.definition import ROOT, load_experiment
from experiments.runner import MeasuredPoint, points_of
from plots import reproduce
from plots.figure import end_lines, load_summary, make_figure
from plots.figures import fig3, fig6, fig7, inflight
from plots.report import figure_sections
from plots.summary import BUSY_MARK
from tests.helpers.busy import BUSY, QUIET
from tests.helpers.command_line import CommandLine

KINDS = {kind.name: kind for kind in (fig3.FIG3, fig6.FIG6, fig7.FIG7, inflight.INFLIGHT)}
Supervise = Callable[..., Outcome]


def run(usage: list[BatchUsage]) -> Supervise:
    """A run in no time whose batches had the machine like that."""

    def fake(framework: str, config: TrainConfig, folder: Path, **options: object) -> Outcome:
        parts = {"activations": 100 * (config.schedule.in_flight_limit or 1)}
        return Outcome(
            batch_times_s=[1.0 if framework == "axonn" else 1.25] * config.steps,
            losses=[4.0] * config.steps,
            memory_parts=parts,
            memory_of_all=parts,
            bytes_per_batch={"row": 10, "col": 20},
            usage=usage * config.steps,
        )

    return fake


def measure(
    name: str, monkeypatch: pytest.MonkeyPatch, usage: Callable[[MeasuredPoint], list[BatchUsage]]
) -> list[MeasuredPoint]:
    points = points_of(load_experiment(ROOT / "experiments" / f"{name}.yaml"))
    for point in points:
        monkeypatch.setattr(runner, "supervise", run(usage(point)))
        runner.run_point(point, command="test")
    return points


def rings(folder: Path, name: str, what: str = "busy") -> int:
    """Marks of the picture, by their ids."""
    return len(re.findall(f'<g id="{what}"', (folder / "out" / f"{name}.svg").read_text()))


@pytest.mark.parametrize("name", KINDS)
def test_every_busy_point_is_marked_and_in_no_ratio(
    name: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(name, monkeypatch, lambda point: [BUSY])
    make_figure(KINDS[name])
    out = capsys.readouterr().out
    summary = load_summary(name)
    assert summary is not None
    measured = [row for row in summary["rows"] if row["kind"] == "measured"]
    assert measured
    assert all(row["busy"] is True and row["in_ratios"] is False for row in measured)
    assert len(summary["busy"]) == len(measured)
    assert all("others took 50% of the cores" in line for line in summary["busy"])
    # Its time over the limit is a ratio, and not drawn.
    assert rings(elsewhere, name) == (0 if name == "inflight" else len(measured))
    # The tables of inflight.yaml have each limit beside 1F1B, which has no row.
    assert out.count(BUSY_MARK) >= len(measured) - (name == "inflight")
    assert f"make reproduce-{name} FRESH=busy" in " ".join(out.split())
    assert all(limit["over_1f1b_pct"] is None for limit in summary.get("limits", []) if limit["kind"] == "measured")
    section = figure_sections.section(name)
    assert "complete" not in section.status
    assert f"{len(measured)} measured on a busy machine" in section.status
    assert any("busy" in line for line in section.to_know)
    cells = [cell for table in section.tables for row in table.rows for cell in row]
    assert sum("others took 50% of the cores" in cell for cell in cells) >= len(measured)
    # On demand they are in ratios, and marked all the same.
    make_figure(KINDS[name], with_busy=True)
    again = load_summary(name)
    assert again is not None
    rows = [row for row in again["rows"] if row["kind"] == "measured"]
    assert all(row["busy"] is True and row["in_ratios"] is True for row in rows)
    assert again["busy"] == summary["busy"]
    assert all(limit["over_1f1b_pct"] is not None for limit in again.get("limits", []) if limit["kind"] == "measured")


@pytest.mark.parametrize("name", KINDS)
def test_on_an_idle_machine_none_is(
    name: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(name, monkeypatch, lambda point: [QUIET])
    make_figure(KINDS[name])
    summary = load_summary(name)
    assert summary is not None
    assert summary["busy"] == summary["not_known_whether_busy"] == []
    assert {row["busy"] for row in summary["rows"] if row["kind"] == "measured"} == {False}
    assert rings(elsewhere, name) == 0
    assert BUSY_MARK not in capsys.readouterr().out


def test_of_repeats_those_of_a_busy_machine_do_not_count_beside_others(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = measure("fig3", monkeypatch, lambda point: [BUSY] if point.repeat == 0 else [QUIET])
    for point in points:
        if point.repeat == 0:
            (record,) = read_records(point.record_file)
            write_records(point.record_file, [record.model_copy(update={"batch_time_s": 9.0})])
    make_figure(fig3.FIG3)
    summary = load_summary("fig3")
    assert summary is not None
    for row in (row for row in summary["rows"] if row["kind"] == "measured"):
        assert (row["busy"], row["busy_repeats"], row["repeats_s"]) == (False, 1, [1.0, 1.0])
        assert row["processor_s"] == pytest.approx(QUIET.processor_s)


def test_of_old_records_nobody_knows(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure("fig3", monkeypatch, lambda point: [])
    assert all(record.busy is None for record in read_all(runner.MEASURED))
    make_figure(fig3.FIG3)
    summary = load_summary("fig3")
    assert summary is not None
    assert summary["busy"] == []
    assert len(summary["not_known_whether_busy"]) == 3
    assert {row["in_ratios"] for row in summary["rows"] if row["kind"] == "measured"} == {True}
    assert "not known whether the machine was busy: 3 point(s)" in " ".join(capsys.readouterr().out.split())
    assert "not known whether" in figure_sections.section("fig3").status


def test_frameworks_that_are_not_installed_are_named_with_the_command(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = measure("fig6", monkeypatch, lambda point: [QUIET])
    for point in points:
        adapter = point.framework.partition("/")[0]
        if adapter in ("deepspeed", "megatron"):
            (record,) = read_records(point.record_file)
            detail = f"{adapter} is not installed; make baselines ONLY={adapter} installs it (.baselines/{adapter})"
            failure = Failure(cause="unavailable", detail=detail)
            write_records(
                point.record_file,
                [record.model_copy(update={"failure": failure, "batch_time_s": None, "batch_times_s": []})],
            )
    make_figure(fig6.FIG6)
    wanted = "not installed, and not measured: DeepSpeed pipeline, Megatron-LM 1F1B"
    summary = load_summary("fig6")
    assert summary is not None
    assert any(line.startswith(wanted) for line in end_lines(summary, "fig6"))
    assert wanted in (out := " ".join(capsys.readouterr().out.split()))
    assert 'make baselines ONLY="deepspeed megatron' in out
    status = figure_sections.section("fig6").status
    assert "not installed: DeepSpeed pipeline, Megatron-LM 1F1B" in status
    assert "complete" not in status
    # make reproduce says it once more at its end.
    reproduce.reproduce(["reproduce-fig6"], run=lambda target: 0)
    assert wanted in " ".join(capsys.readouterr().out.split())


def test_axonn_run_says_it_and_measures_the_busy_ones_anew(axonn: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = axonn.experiment(max_ranks=2)
    monkeypatch.setattr(runner, "supervise", run([BUSY]))
    code, out, _ = axonn("run", experiment)
    said = " ".join(out.split())
    assert code == 0
    assert "2 of them measured while the machine was busy" in said
    assert "others took up to 50% of the cores" in said
    # They are done.
    code, out, _ = axonn("run", experiment)
    assert "nothing to do: 2 measured points" in out
    assert f"axonn run {experiment} --fresh-busy" in " ".join(out.split())
    monkeypatch.setattr(runner, "supervise", run([QUIET]))
    code, out, _ = axonn("run", experiment, "--fresh-busy")
    assert code == 0
    assert "2 of 2 points measured" in out
    assert "busy" not in out
    assert [record.busy for record in read_all(runner.MEASURED)] == [False, False]
    assert "nothing to do" in axonn("run", experiment, "--fresh-busy")[1]
