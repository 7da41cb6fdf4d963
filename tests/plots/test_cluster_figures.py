"""Figures with what clusters measured: kept where it belongs, by machine, never as if it was this one's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from axonn.config.train_config import TrainConfig
from axonn.observability.records import Execution, Machine, Record, Workload, write_records
from axonn.training.framework import load_framework
from axonn.training.run_record import configuration_of
from experiments import runner
from experiments.definition import ROOT, Experiment, load_experiment
from experiments.published_points import published_records
from experiments.runner import measured_work
from plots.figure import FigureKind, make_figure, say_missing, summarise
from plots.figure_records import gather
from plots.figures import fig3, fig5, fig6, fig7
from plots.report import point_tables
from plots.summary import elsewhere as other_machines
from plots.summary import here, rows_of, wrong_orders


def load(name: str) -> Experiment:
    return load_experiment(ROOT / "experiments" / f"{name}.yaml")


def small(
    name: str, machine: str, *, most: int | None = None, seconds: float = 0.5, device: str = "cpu"
) -> list[Record]:
    """Records of all small points of an experiment with the frameworks of this suite, on a cluster or here."""
    work = [w for w in measured_work(load(name), most=most) if w[2] in ("axonn", "pytorch/1f1b")]
    return [_record(name, label, config, framework, machine, seconds) for label, config, framework in work]


def _record(  # noqa: PLR0917
    name: str, label: str, config: TrainConfig, framework: str, machine: str, seconds: float
) -> Record:
    g = config.grid
    ranks = g.size
    parts = {"compute": 0.5, "point_to_point": 0.2, "bubble": 0.1, "all_reduce": 0.1, "optimizer": 0.05}
    return Record(
        kind="measured",
        experiment=name,
        point=label,
        asked=Workload.of(config.model, gpus=ranks, batch_size=config.batch_size, precision="float32"),
        ran=Execution(
            framework=load_framework(framework).label, version="1", grid=g, microbatch_size=config.microbatch_size
        ),
        machine=Machine(name=machine, device="cpu"),
        source="axonn collect",
        batch_time_s=seconds,
        batch_times_s=[seconds] * 3,
        warmup_batches=1,
        losses=[4.0] * 3,
        parts_s={part: share * seconds for part, share in parts.items()},
        overlap_s={"compute": seconds, "collective": 0.2, "hidden": 0.1, "hideable": 0.15},
        bytes_per_batch={"col": 1000},
        configuration=configuration_of(config),
    )


def at_scale(name: str, machine: str, factor: float = 1.1) -> list[Record]:
    """The published points, as a cluster measured them."""
    on = Machine(name=machine, device="V100")
    return [
        r.model_copy(update={"kind": "measured", "machine": on, "batch_time_s": factor * (r.batch_time_s or 1.0)})
        for r in published_records(load(name))
    ]


def keep(records: Sequence[Record]) -> None:
    for i, record in enumerate(records):
        write_records(runner.MEASURED / f"{record.experiment}-{i:03d}.json", [record])


def drawn(kind: FigureKind, elsewhere: Path) -> tuple[dict[str, Any], str]:
    """Summary, and the words of the picture."""
    make_figure(kind, fresh=True)
    summary = json.loads((elsewhere / "results" / kind.name / "summary.json").read_text())
    return summary, (elsewhere / "out" / f"{kind.name}.svg").read_text()


def test_small_points_of_clusters_of_any_size_belong(elsewhere: Path) -> None:
    four, many = small("fig6", "four-nodes", most=4), small("fig6", "perlmutter", most=64)
    changed = four[0].model_copy(update={"configuration": "another"})
    unknown = four[0].model_copy(update={"point": "as it was called"})
    keep([*four, *many, changed, unknown])
    content = gather(load("fig6"))
    assert len(content.measured) == len(four) + len(many)
    groups = other_machines(rows_of(content.published, content.measured))
    assert {key: len(rows) for key, rows in groups.items()} == {("four-nodes", 64): 6, ("perlmutter", 1024): 14}
    # They are none of this machine's.
    assert any("gpt-4x256-1r AxoNN is not measured" in line for line in content.missing)


def test_machines_and_work_are_never_one_row(elsewhere: Path) -> None:
    name = "this machine"
    records = [
        *small("fig6", name),
        *small("fig6", "four-nodes", most=4, seconds=9.0),
        *small("fig6", "four-nodes", most=2),
    ]
    keep(records)
    rows = rows_of([], gather(load("fig6")).measured)
    one = [r for r in rows if (r["point"], r["framework"]) == ("gpt-4x256-1r", "AxoNN")]
    assert [(r["machine"]["name"], r["batch_time_s"], r.get("batch_size")) for r in one] == [
        (name, 0.5, None),
        ("four-nodes", 9.0, 64),
        ("four-nodes", 0.5, 32),
    ]
    assert [here(r) for r in one] == [True, False, False]


def test_orders_are_compared_on_one_machine(elsewhere: Path) -> None:
    slow = [r for r in at_scale("fig6", "one", 9.0) if r.ran.framework == "AxoNN"]
    fast = [r for r in at_scale("fig6", "two") if r.ran.framework != "AxoNN"]
    rows = rows_of(published_records(load("fig6")), [*slow, *fast])
    assert not [line for line in wrong_orders(rows, "measured") if "AxoNN is published faster" in line]


def test_figure_6_has_a_panel_for_each_machine(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep([*small("fig6", "four-nodes", most=4), *at_scale("fig6", "summit"), *at_scale("fig6", "frontier", 0.5)])
    summary, words = drawn(fig6.FIG6, elsewhere)
    for text in ("On four-nodes, batch 64", "measured on summit", "measured on frontier"):
        assert text in words
    assert "not measured on this machine" not in words
    assert "On this machine" not in words
    out = capsys.readouterr().out
    assert "On four-nodes (CPU), batch 64" in out
    machines = {row["machine"]["name"] for row in summary["rows"] if row["kind"] == "measured"}
    assert machines == {"four-nodes", "summit", "frontier"}
    titles = [table.caption for table in point_tables.tables_of(summary, summary["rows"])]
    for text in ("on four-nodes, batch 64", "on summit, at the published scale", "on frontier, at the published scale"):
        assert any(f"Measured {text}" in title for title in titles)


def test_figure_6_says_what_processors_measured_beside_gpus(elsewhere: Path) -> None:
    records = at_scale("fig6", "summit")
    ours = [r for r in records if r.ran.framework == "AxoNN"]
    on = ours[0].machine.model_copy(update={"device": "cpu"})
    keep([*(r for r in records if r not in ours), *(r.model_copy(update={"machine": on}) for r in ours)])
    _, words = drawn(fig6.FIG6, elsewhere)
    assert "(AxoNN on summit: measured on CPUs)" in words


def test_figure_3_has_bars_for_each_machine(elsewhere: Path) -> None:
    keep([*small("fig3", "this machine"), *small("fig3", "four-nodes", seconds=0.25), *at_scale("fig3", "summit")])
    summary, words = drawn(fig3.FIG3, elsewhere)
    assert "2 ranks of four-nodes, batch 16" in words
    bars = {(b["point"], b.get("machine")): b["bar_s"] for b in summary["parts"] if b["kind"] == "measured"}
    assert bars["G_inter 2, state on the device", None] == 0.5
    assert bars["G_inter 2, state on the device", "four-nodes"] == 0.25
    assert sum(machine == "summit" for _, machine in bars) == 2
    assert "G_inter 2, state on the device on four-nodes" in summary["unexplained_pct"]


def test_figures_5_and_7_name_the_machine(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep([*small("fig7", "four-nodes"), *small("fig5", "four-nodes")])
    summary, words = drawn(fig7.FIG7, elsewhere)
    assert "Batch time, measured on four-nodes (CPU)" in words
    assert {b["machine"] for b in summary["bytes_here"]} == {"four-nodes"}
    assert not any(b["agree"] for b in summary["bytes_here"])
    assert "2 x 2 on four-nodes" in capsys.readouterr().out
    found = summarise(fig5.FIG5, gather(load("fig5")))
    assert [(s["kind"], s["machine"]) for s in found["overlap"]] == [("measured", "four-nodes")] * 2


def test_what_is_missing_does_not_cover_the_legend() -> None:
    from matplotlib.figure import Figure

    for at_the_foot in (True, False):
        figure = Figure(figsize=(4, 3), layout="constrained")
        figure.subplots().plot([0, 1], label="a line")
        place, title = ("outside lower center", None) if at_the_foot else ("outside upper center", "Title")
        legend = figure.legend(loc=place, title=title)
        say_missing(figure, ["a point is not measured; run it"])
        figure.draw_without_rendering()
        (words,) = figure.findobj(lambda found: isinstance(found, Text) and "missing: a point" in found.get_text())
        entry = legend.get_texts()[0].get_window_extent()
        assert not words.get_window_extent().overlaps(entry)
        assert (legend.get_title() is words) == at_the_foot
