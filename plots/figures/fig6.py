"""Figure 6: weak scaling of inter-layer parallelism. python -m plots.figures.fig6 [--fresh]"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from axonn.training.provenance import this_machine
from plots.figure import Content, FigureKind, main
from plots.style import COLUMN_IN, KIND_LINES, colours, mark, mark_handle
from plots.summary import device_of, elsewhere, here, machine_of, measured_tables, naive, published_table, wrong_orders

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"AxoNN": "o", "DeepSpeed": "s", "Megatron-LM": "^", "PyTorch 1F1B": "D"}
OTHER_MARKERS = "vP<>Xp"
MEASURED_LINES = (KIND_LINES["measured"], (0, (3, 1, 1, 1)), (0, (7, 2)), (0, (1, 3)))
FILLINGS = ("none", "left", "top", "right")
"""Line and markers of the first machine whose measured points are drawn at the published scale, and of the others."""


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
    """The published scale above; below, a panel for this machine and for each other one. As wide as a column."""
    import matplotlib.pyplot as plt

    rows = summary["rows"]
    markers = _markers(rows)
    looks = Looks(markers=markers, palette=dict(zip(markers, colours(len(markers)), strict=True)))
    local = [r for r in rows if here(r)]
    cores = local[0]["machine"].get("cores") if local else this_machine().cores
    panels = [(f"On this machine ({cores} cores, CPU)", local)]
    for (machine, batch), own in elsewhere(rows).items():
        panels.append((f"On {machine}, batch {batch}\n({device_of(own)})", own))
    if len(panels) > 1:
        panels = [(title, own) for title, own in panels if own]
    figure, axes = plt.subplots(
        1 + len(panels), 1, figsize=(COLUMN_IN, 2.8 * (1 + len(panels))), constrained_layout=True
    )
    _draw_at_scale(axes[0], [r for r in rows if r["kind"] == "published" or r["published_s"] is not None], looks)
    for lower, (title, own) in zip(axes[1:], panels, strict=True):
        _draw_measured(lower, own, looks)
        lower.set(xlabel="ranks, model (gpt-layers x hidden)", ylabel="seconds per batch", title=title)
    figure.suptitle(summary["title"], fontsize=9)
    return figure


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Marker and colour by framework."""

    markers: dict[str, str]
    palette: dict[str, Any]


def _draw_at_scale(upper: Axes, at_scale: Sequence[dict[str, Any]], looks: Looks) -> None:
    """A line for each framework and kind; of measured points, for each machine."""
    from matplotlib.lines import Line2D

    machines = list(dict.fromkeys(machine_of(r) for r in at_scale if r["kind"] == "measured"))
    lines: dict[tuple[str, str], Any] = {(kind, ""): line for kind, line in KIND_LINES.items() if kind != "measured"}
    lines |= dict(zip((("measured", name) for name in machines), cycle(MEASURED_LINES), strict=False))
    fillings = dict(zip(machines, cycle(FILLINGS), strict=False))

    def filled(kind: str, machine: str, colour: Any) -> dict[str, Any]:
        filling = fillings.get(machine, "none")
        if kind == "published" or filling == "none":
            return {"markerfacecolor": colour if kind == "published" else "white"}
        return {"fillstyle": filling, "markerfacecolor": colour, "markerfacecoloralt": "white"}

    def points(kind: str, machine: str, framework: str | None = None) -> list[tuple[int, float]]:
        return [
            (r["gpus"], r["batch_time_s"])
            for r in at_scale
            if r["kind"] == kind and framework in (None, r["framework"]) and machine in ("", machine_of(r))
        ]

    for framework in dict.fromkeys(r["framework"] for r in at_scale):
        for (kind, machine), line in lines.items():
            if drawn := points(kind, machine, framework):
                upper.plot(
                    *zip(*sorted(drawn), strict=True),
                    linestyle=line,
                    color=looks.palette[framework],
                    marker=looks.markers[framework],
                    markersize=5,
                    linewidth=1.1,
                    **filled(kind, machine, looks.palette[framework]),
                )
    busy = [r for r in at_scale if r.get("busy")]
    mark(upper, [r["gpus"] for r in busy], [r["batch_time_s"] for r in busy], "busy")
    names = {r["gpus"]: r["model"].removeprefix("gpt-").upper() for r in at_scale}
    upper.set_xscale("log", base=2)
    upper.set_xticks(list(names), [f"{gpus}\n{name}" for gpus, name in names.items()])
    upper.minorticks_off()
    upper.set_ylim(bottom=0)
    ranks = "GPUs" if machines else "GPUs of Summit"
    upper.set(
        xlabel=f"{ranks}, model", ylabel="seconds per batch", title="At the published scale" + _on_processors(at_scale)
    )
    used = list(dict.fromkeys(r["framework"] for r in at_scale))
    handles = [
        Line2D([], [], color=looks.palette[f], marker=looks.markers[f], markersize=5, linewidth=0, label=f)
        for f in used
    ]
    handles += [
        Line2D(
            [], [], color="0.25", linestyle=line, marker="o", markersize=4,
            label=f"{kind} on {machine}" if machine else kind, **filled(kind, machine, "0.25"),
        )
        for (kind, machine), line in lines.items() if points(kind, machine)
    ]  # fmt: skip
    if busy:
        handles.append(mark_handle("busy"))
    if machines:
        # Above the points there is room for the names of machines.
        upper.set_ylim(top=max(r["batch_time_s"] for r in at_scale) / (1 - 0.05 * len(handles)))
    upper.legend(handles=handles, fontsize=6.5, ncols=2, loc="upper left", handlelength=2.4)


def _on_processors(at_scale: Sequence[dict[str, Any]]) -> str:
    """A line that names what was measured on processors beside others' GPUs; nothing where there is none."""
    found = [r for r in at_scale if r["kind"] == "measured" and device_of([r]) == "CPU"]
    who = dict.fromkeys(f"{r['framework']} on {machine_of(r)}" for r in found)
    return f"\n({', '.join(who)}: measured on CPUs)" if who else ""


def _draw_measured(lower: Axes, local: Sequence[dict[str, Any]], looks: Looks) -> None:
    """The small points of one machine, by ranks."""
    from matplotlib.lines import Line2D

    if not local:
        lower.text(0.5, 0.5, "not measured on this machine", ha="center", transform=lower.transAxes)
        return
    frameworks = list(dict.fromkeys(r["framework"] for r in local))
    for i, framework in enumerate(frameworks):
        mine = sorted((r for r in local if r["framework"] == framework), key=lambda r: r["gpus"])
        # Side by side, so that points of nearly equal height are both seen.
        shift = 2 ** (0.06 * (i - (len(frameworks) - 1) / 2))
        x = [r["gpus"] * shift for r in mine]
        colour = looks.palette[framework]
        lower.plot(
            x, [r["batch_time_s"] for r in mine], KIND_LINES["measured"], color=colour, linewidth=1.1,
            marker=looks.markers[framework], markersize=5, markerfacecolor="white", label=framework,
        )  # fmt: skip
        for at, row in zip(x, mine, strict=True):
            repeats = row["repeats_s"]
            lower.plot([at] * len(repeats), repeats, "_", color=colour, markersize=7, alpha=0.8)
            if row["busy"]:
                mark(lower, [at], [row["batch_time_s"]], "busy")
    ranks = sorted({r["gpus"] for r in local})
    lower.set_xscale("log", base=2)
    models = {r["gpus"]: r["model"] for r in local}
    lower.set_xticks(ranks, [f"{n}\n{models[n]}" for n in ranks])
    lower.set_xlim(ranks[0] / 1.3, ranks[-1] * 1.3)
    lower.minorticks_off()
    dash = Line2D([], [], color="0.25", marker="_", linewidth=0, markersize=7, label="one run (mean of its batches)")
    rings = [mark_handle("busy")] if any(r["busy"] for r in local) else []
    lower.set_ylim(0, 1.15 * max(max(r["repeats_s"]) for r in local))
    # Times of a weak scaling hardly differ, so that there is room below them.
    lower.legend(
        handles=[*lower.get_legend_handles_labels()[0], dash, *rings], fontsize=6, ncols=2, loc="lower left",
        title="measured", title_fontsize=6, columnspacing=1,
    )  # fmt: skip


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
    yield from measured_tables(rows, content.failures)


FIG6 = FigureKind(name="fig6", draw=draw, tables=tables, extras=extras)

if __name__ == "__main__":
    main(FIG6)
