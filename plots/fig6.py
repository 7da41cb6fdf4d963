"""Figure 6: weak scaling of inter-layer parallelism. python -m plots.fig6 [--fresh]

Reads the records of results/, writes plots/out/fig6.png and .svg and results/fig6/summary.json, prints the tables.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from axonn.errors import AxonnError, RecordError
from axonn.records import Record, read_all, read_records
from experiments.definition import ROOT, Experiment, load_experiment
from experiments.predictor import predicted_file
from experiments.provenance import fingerprint, sources, this_machine
from experiments.runner import MEASURED
from plots.summary import mape, measured_table, naive, not_run, published_table, rows_of, wrong_orders

EXPERIMENT = ROOT / "experiments" / "fig6.yaml"
OUT = ROOT / "plots" / "out"
SUMMARY = ROOT / "results" / "fig6" / "summary.json"
MARKERS = {"AxoNN": "o", "DeepSpeed": "s", "Megatron-LM": "^", "PyTorch 1F1B": "D"}
OTHER_MARKERS = "vP<>Xp"
KINDS = {"published": "-", "predicted": "--", "measured": ":"}
"""Kinds of points are told apart by the line, the filling of the marker and the legend, not by colour."""


def load(experiment: Experiment) -> tuple[list[Record], list[Record]]:
    """Published records, and all others of this experiment. Raises `RecordError` when predictions are missing."""
    published = read_records(ROOT / experiment.published)
    path = predicted_file(experiment)
    if not path.exists():
        raise RecordError(f"{path.relative_to(ROOT)} is missing; run: axonn predict experiments/{experiment.name}.yaml")
    measured = [r for r in read_all(MEASURED) if r.experiment == experiment.name]
    return published, [*read_records(path), *measured]


def summarise(experiment: Experiment, published: Sequence[Record], others: Sequence[Record]) -> dict[str, Any]:
    """What summary.json holds (DESIGN section 8)."""
    rows = rows_of(published, others)
    measured = [r for r in others if r.kind == "measured"]
    return {
        "figure": experiment.name,
        "title": experiment.title,
        "rows": rows,
        "mape_pct": mape(rows),
        "wrong_orders": {kind: wrong_orders(rows, kind) for kind in ("predicted", "measured")},
        "naive": naive(published),
        "failures": [r.model_dump(mode="json", exclude_none=True) for r in others if r.failure is not None],
        "policy": {
            "batches": experiment.measured.batches,
            "warmup_batches": experiment.measured.warmup_batches,
            "repeats": experiment.measured.repeats,
            "batch_time_s": "mean over the batches after warm-up; over repeats the median",
            "loss_tolerance": experiment.measured.loss_tolerance,
        },
        "provenance": {
            "command": "make reproduce-fig6",
            "machine": this_machine().model_dump(exclude_none=True),
            "records": {
                "published": experiment.published,
                "predicted": str(predicted_file(experiment).relative_to(ROOT)),
                "measured": sorted({str(r.run_folder) for r in measured if r.run_folder}),
            },
        },
    }


def _markers(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A marker for each framework, the same in every figure for the best known."""
    others = [name for name in dict.fromkeys(row["framework"] for row in rows) if name not in MARKERS]
    return MARKERS | dict(zip(others, cycle(OTHER_MARKERS)))


def draw(rows: Sequence[dict[str, Any]], experiment: Experiment) -> None:
    """Write fig6.png and fig6.svg: two panels one above the other, as wide as a column (3.5 inches)."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib.lines import Line2D

    sns.set_theme(context="paper", style="whitegrid", font_scale=0.85, rc={"svg.hashsalt": "fig6"})
    markers = _markers(rows)
    palette = dict(zip(markers, sns.color_palette("colorblind", len(markers)), strict=True))
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(3.5, 5.6), constrained_layout=True)

    at_scale = [r for r in rows if r["kind"] == "published" or r["published_s"] is not None]
    for framework in dict.fromkeys(r["framework"] for r in at_scale):
        for kind, line in KINDS.items():
            points = [
                (r["gpus"], r["batch_time_s"]) for r in at_scale if (r["framework"], r["kind"]) == (framework, kind)
            ]
            if points:
                upper.plot(
                    *zip(*sorted(points), strict=True),
                    line,
                    color=palette[framework],
                    marker=markers[framework],
                    markersize=5,
                    markerfacecolor=palette[framework] if kind == "published" else "white",
                    linewidth=1.1,
                )
    names = {r["gpus"]: r["model"].removeprefix("gpt-").upper() for r in at_scale}
    upper.set_xscale("log", base=2)
    upper.set_xticks(list(names), [f"{gpus}\n{name}" for gpus, name in names.items()])
    upper.minorticks_off()
    upper.set_ylim(bottom=0)
    upper.set(xlabel="GPUs of Summit, model", ylabel="seconds per batch", title="At the published scale")
    used = list(dict.fromkeys(r["framework"] for r in at_scale))
    kinds = [k for k in KINDS if any(r["kind"] == k for r in at_scale)]
    handles = [Line2D([], [], color=palette[f], marker=markers[f], markersize=5, linewidth=0, label=f) for f in used]
    handles += [
        Line2D(
            [], [], color="0.25", linestyle=KINDS[k], marker="o", markersize=4, label=k,
            markerfacecolor="0.25" if k == "published" else "white",
        )
        for k in kinds
    ]  # fmt: skip
    upper.legend(handles=handles, fontsize=6.5, ncols=2, loc="upper left", handlelength=2.4)

    here = [r for r in rows if r["kind"] == "measured" and r["published_s"] is None]
    frameworks = list(dict.fromkeys(r["framework"] for r in here))
    for i, framework in enumerate(frameworks):
        mine = sorted((r for r in here if r["framework"] == framework), key=lambda r: r["gpus"])
        # Side by side, so that points of nearly equal height are both seen.
        shift = 2 ** (0.06 * (i - (len(frameworks) - 1) / 2))
        x = [r["gpus"] * shift for r in mine]
        lower.plot(
            x, [r["batch_time_s"] for r in mine], KINDS["measured"], color=palette[framework], linewidth=1.1,
            marker=markers[framework], markersize=5, markerfacecolor="white", label=f"{framework}, measured",
        )  # fmt: skip
        for at, row in zip(x, mine, strict=True):
            repeats = row["repeats_s"]
            lower.plot([at] * len(repeats), repeats, "_", color=palette[framework], markersize=7, alpha=0.8)
    if here:
        ranks = sorted({r["gpus"] for r in here})
        lower.set_xscale("log", base=2)
        models = {r["gpus"]: r["model"] for r in here}
        lower.set_xticks(ranks, [f"{n}\n{models[n]}" for n in ranks])
        lower.set_xlim(ranks[0] / 1.3, ranks[-1] * 1.3)
        lower.minorticks_off()
        lower.set_ylim(0, 1.3 * max(max(r["repeats_s"]) for r in here))
        dash = Line2D(
            [], [], color="0.25", marker="_", linewidth=0, markersize=7, label="single run (mean of its batches)"
        )
        lower.legend(handles=[*lower.get_legend_handles_labels()[0], dash], fontsize=6.5, loc="lower left")
    else:
        lower.text(0.5, 0.5, "not measured on this machine", ha="center", transform=lower.transAxes)
    cores = this_machine().cores
    lower.set(
        xlabel="ranks, model (gpt-layers x hidden)",
        ylabel="seconds per batch",
        title=f"On this machine ({cores} cores, CPU)",
    )
    figure.suptitle(experiment.title, fontsize=9)
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT / "fig6.png", dpi=300)
    figure.savefig(OUT / "fig6.svg", metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str]) -> None:
    console = Console()
    experiment = load_experiment(EXPERIMENT)
    published, others = load(experiment)
    mark = fingerprint(
        [r.model_dump(mode="json") for r in [*published, *others]], sources("plots/*.py", "experiments/fig6.yaml")
    )
    outputs = [OUT / "fig6.png", OUT / "fig6.svg", SUMMARY]
    fresh = "--fresh" in arguments or not all(p.exists() for p in outputs)
    summary = None if fresh else _known(mark)
    if summary is None:
        summary = summarise(experiment, published, others) | {"fingerprint": mark}
        draw(summary["rows"], experiment)
        SUMMARY.parent.mkdir(parents=True, exist_ok=True)
        SUMMARY.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    else:
        console.print("nothing to do: the figure is newer than all its records")
    rows = summary["rows"]
    console.print(published_table(rows, summary["naive"]))
    predicted = summary["mape_pct"].get("predicted", {})
    console.print(
        f"mean absolute error of the predictions: {predicted.get('all', float('nan')):.1f}% "
        f"({', '.join(f'{k} {v:.1f}%' for k, v in predicted.items() if k != 'all')}); "
        f"of a constant {summary['naive']['tflops_per_gpu']:.1f} TFLOP/s, fitted on these points: "
        f"{summary['naive']['mape_pct']:.1f}%"
    )
    for line in summary["wrong_orders"]["predicted"]:
        console.print(f"[yellow]wrong order: {line}[/yellow]")
    failures = [r for r in others if r.failure is not None]
    console.print(measured_table(rows, failures))
    for line in not_run(failures):
        console.print(f"[yellow]{escape(line)}[/yellow]", soft_wrap=True)
    console.print(f"figure: {', '.join(str(p.relative_to(ROOT)) for p in outputs)}")


def _known(mark: str) -> dict[str, Any] | None:
    """The summary on disk, if it was made from the same records by the same code."""
    try:
        summary = json.loads(Path(SUMMARY).read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    return summary if isinstance(summary, dict) and summary.get("fingerprint") == mark else None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxonnError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True, markup=True)
        sys.exit(2)
