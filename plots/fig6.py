"""Figure 6: weak scaling of inter-layer parallelism. python -m plots.fig6 [--fresh]"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from experiments.provenance import this_machine
from plots.figure import Content, FigureKind, main
from plots.style import COLUMN_IN, KINDS, colours
from plots.summary import here, measured_table, naive, published_table, wrong_orders

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = {"AxoNN": "o", "DeepSpeed": "s", "Megatron-LM": "^", "PyTorch 1F1B": "D"}
OTHER_MARKERS = "vP<>Xp"


def extras(content: Content, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Orders that are not the published ones, and what a constant rate would have predicted."""
    return {
        "wrong_orders": {kind: wrong_orders(rows, kind) for kind in ("predicted", "measured")},
        "naive": naive(content.published),
    }


def _markers(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A marker for each framework, the same in every figure for the best known."""
    others = [name for name in dict.fromkeys(row["framework"] for row in rows) if name not in MARKERS]
    return MARKERS | dict(zip(others, cycle(OTHER_MARKERS)))


def draw(summary: dict[str, Any], content: Content) -> Figure:
    """Two panels one above the other, as wide as a column."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    rows = summary["rows"]
    markers = _markers(rows)
    palette = dict(zip(markers, colours(len(markers)), strict=True))
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(COLUMN_IN, 5.6), constrained_layout=True)

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

    local = [r for r in rows if here(r)]
    frameworks = list(dict.fromkeys(r["framework"] for r in local))
    for i, framework in enumerate(frameworks):
        mine = sorted((r for r in local if r["framework"] == framework), key=lambda r: r["gpus"])
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
    if local:
        ranks = sorted({r["gpus"] for r in local})
        lower.set_xscale("log", base=2)
        models = {r["gpus"]: r["model"] for r in local}
        lower.set_xticks(ranks, [f"{n}\n{models[n]}" for n in ranks])
        lower.set_xlim(ranks[0] / 1.3, ranks[-1] * 1.3)
        lower.minorticks_off()
        lower.set_ylim(0, 1.3 * max(max(r["repeats_s"]) for r in local))
        dash = Line2D(
            [], [], color="0.25", marker="_", linewidth=0, markersize=7, label="single run (mean of its batches)"
        )
        lower.legend(handles=[*lower.get_legend_handles_labels()[0], dash], fontsize=6.5, loc="lower left")
    else:
        lower.text(0.5, 0.5, "not measured on this machine", ha="center", transform=lower.transAxes)
    cores = local[0]["machine"].get("cores") if local else this_machine().cores
    lower.set(
        xlabel="ranks, model (gpt-layers x hidden)",
        ylabel="seconds per batch",
        title=f"On this machine ({cores} cores, CPU)",
    )
    figure.suptitle(summary["title"], fontsize=9)
    return figure


def tables(summary: dict[str, Any], content: Content) -> Iterator[RenderableType]:
    """Both panels in numbers."""
    rows, constant = summary["rows"], summary["naive"]
    yield published_table(rows, constant)
    predicted = summary["mape_pct"].get("predicted", {})
    yield (
        f"mean absolute error of the predictions: {predicted.get('all', float('nan')):.1f}% "
        f"({', '.join(f'{k} {v:.1f}%' for k, v in predicted.items() if k != 'all')}); "
        f"of a constant {constant['tflops_per_gpu']:.1f} TFLOP/s, fitted on these points: "
        f"{constant['mape_pct']:.1f}%"
    )
    for line in summary["wrong_orders"]["predicted"]:
        yield f"[yellow]wrong order: {line}[/yellow]"
    yield measured_table(rows, content.failures)


FIG6 = FigureKind(name="fig6", draw=draw, tables=tables, extras=extras)

if __name__ == "__main__":
    main(FIG6)
