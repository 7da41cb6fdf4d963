"""Figure 6: weak scaling of inter-layer parallelism. python -m plots.figures.fig6 [--fresh]"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import RenderableType

from axonn.training.provenance import this_machine
from plots import style
from plots.figure import FigureKind, main
from plots.figure_records import Content
from plots.style import COLUMN_IN, LINES, colours, mark, mark_handle
from plots.summary import device_of, elsewhere, here, machine_of, measured_tables, naive, published_table, wrong_orders

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MARKERS = {"AxoNN": "o", "DeepSpeed": "s", "Megatron-LM": "^", "PyTorch 1F1B": "D"}
"""Markers of the best known frameworks, the same in every figure."""
OTHER_MARKERS = "vP<>Xp"
MEASURED_LINES = (LINES["measured"], (0, (3, 1, 1, 1)), (0, (7, 2)), (0, (1, 3)))
FILLINGS = ("none", "left", "top", "right")
"""Line and filling of the first machine with measured points at the published scale, and of further ones."""


def extras(content: Content, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return orders that differ from the published ones, and the predictions of a constant rate."""
    return {
        "wrong_orders": {kind: wrong_orders(rows, kind) for kind in ("predicted", "measured")},
        "naive": naive(content.published),
    }


def _markers(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return a marker for each framework."""
    further = [name for name in dict.fromkeys(row["framework"] for row in rows) if name not in MARKERS]
    return MARKERS | dict(zip(further, cycle(OTHER_MARKERS)))


def draw(summary: dict[str, Any], content: Content) -> Figure:
    """Draw the published scale above, and a panel for this machine and each other one below. As wide as a column."""
    import matplotlib.pyplot as plt

    rows = summary["rows"]
    markers = _markers(rows)
    looks = Looks(markers=markers, palette=dict(zip(markers, colours(len(markers)), strict=True)))
    local = [r for r in rows if here(r)]
    cores = local[0]["machine"].get("cores") if local else this_machine().cores
    panels = [(f"On this machine ({cores} cores, CPU)", local)]
    for (machine, batch), machine_rows in elsewhere(rows).items():
        panels.append((f"On {machine}, batch {batch}\n({device_of(machine_rows)})", machine_rows))
    if len(panels) > 1:
        panels = [(title, panel_rows) for title, panel_rows in panels if panel_rows]
    figure, axes = plt.subplots(
        1 + len(panels), 1, figsize=(COLUMN_IN, 2.8 * (1 + len(panels))), constrained_layout=True
    )
    at_scale = [r for r in rows if r["kind"] == "published" or r["published_s"] is not None]
    _draw_at_scale(axes[0], at_scale, looks)
    for lower, (title, panel_rows) in zip(axes[1:], panels, strict=True):
        _draw_measured(lower, panel_rows, looks)
        lower.set(xlabel="ranks, model (gpt-layers x hidden)", ylabel="seconds per batch", title=title)
    figure.suptitle(summary["title"], fontsize=9)
    _write_published_panel([r for r in at_scale if r["kind"] != "measured"], looks)
    return figure


def published_panel() -> Path:
    """Return the file of the published scale alone, without what was measured anywhere."""
    return style.OUT / "fig6-published.png"


def _write_published_panel(at_scale: Sequence[dict[str, Any]], looks: Looks) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(COLUMN_IN, 2.8), constrained_layout=True)
    _draw_at_scale(axes, at_scale, looks)
    published_panel().parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(published_panel(), dpi=300)
    plt.close(figure)


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Marker and colour by framework."""

    markers: dict[str, str]
    palette: dict[str, Any]


class ScaleLine(NamedTuple):
    """The look of a kind of points at the published scale; of measured ones, of one machine's."""

    kind: str
    machine: str
    """Empty for kinds that are not measured."""
    line: Any
    filling: str

    @property
    def label(self) -> str:
        """Text in the legend."""
        return f"{self.kind} on {self.machine}" if self.machine else self.kind

    def marker_filling(self, colour: Any) -> dict[str, Any]:
        """Return the options of matplotlib that fill the markers with this colour."""
        if self.kind == "published" or self.filling == "none":
            return {"markerfacecolor": colour if self.kind == "published" else "white"}
        return {"fillstyle": self.filling, "markerfacecolor": colour, "markerfacecoloralt": "white"}

    def has(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row is one of these points."""
        return row["kind"] == self.kind and self.machine in ("", machine_of(row))


def _scale_lines(machines: Sequence[str]) -> list[ScaleLine]:
    """Return a look for each kind of points, and for each machine with measured ones."""
    lines = [ScaleLine(kind, "", line, "none") for kind, line in LINES.items() if kind != "measured"]
    looks = zip(machines, cycle(MEASURED_LINES), cycle(FILLINGS), strict=False)
    return lines + [ScaleLine("measured", machine, line, filling) for machine, line, filling in looks]


def _draw_at_scale(upper: Axes, at_scale: Sequence[dict[str, Any]], looks: Looks) -> None:
    """Draw a line for each framework and kind; of measured points, for each machine."""
    machines = list(dict.fromkeys(machine_of(r) for r in at_scale if r["kind"] == "measured"))
    lines = [line for line in _scale_lines(machines) if any(map(line.has, at_scale))]
    frameworks = list(dict.fromkeys(r["framework"] for r in at_scale))
    for framework in frameworks:
        for line in lines:
            points = [(r["gpus"], r["batch_time_s"]) for r in at_scale if r["framework"] == framework and line.has(r)]
            if points:
                upper.plot(
                    *zip(*sorted(points), strict=True),
                    linestyle=line.line,
                    color=looks.palette[framework],
                    marker=looks.markers[framework],
                    markersize=5,
                    linewidth=1.1,
                    **line.marker_filling(looks.palette[framework]),
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
    handles = _scale_handles(frameworks, lines, looks) + ([mark_handle("busy")] if busy else [])
    if machines:
        # Above the points there is room for the names of machines.
        upper.set_ylim(top=max(r["batch_time_s"] for r in at_scale) / (1 - 0.05 * len(handles)))
    upper.legend(handles=handles, fontsize=6.5, ncols=2, loc="upper left", handlelength=2.4)


def _scale_handles(frameworks: Sequence[str], lines: Sequence[ScaleLine], looks: Looks) -> list[Line2D]:
    """Return the legend's entries for these frameworks and lines."""
    from matplotlib.lines import Line2D

    return [
        *(
            Line2D([], [], color=looks.palette[f], marker=looks.markers[f], markersize=5, linewidth=0, label=f)
            for f in frameworks
        ),
        *(
            Line2D(
                [], [], color="0.25", linestyle=line.line, marker="o", markersize=4, label=line.label,
                **line.marker_filling("0.25"),
            )
            for line in lines
        ),
    ]  # fmt: skip


def _on_processors(at_scale: Sequence[dict[str, Any]]) -> str:
    """Return a line that names the points measured on processors beside others on GPUs; "" where there is none."""
    on_processors = [r for r in at_scale if r["kind"] == "measured" and device_of([r]) == "CPU"]
    names = dict.fromkeys(f"{r['framework']} on {machine_of(r)}" for r in on_processors)
    return f"\n({', '.join(names)}: measured on CPUs)" if names else ""


def _draw_measured(lower: Axes, local: Sequence[dict[str, Any]], looks: Looks) -> None:
    """Draw the small points of one machine over the number of ranks."""
    from matplotlib.lines import Line2D

    if not local:
        lower.text(0.5, 0.5, "not measured on this machine", ha="center", transform=lower.transAxes)
        return
    frameworks = list(dict.fromkeys(r["framework"] for r in local))
    for i, framework in enumerate(frameworks):
        points = sorted((r for r in local if r["framework"] == framework), key=lambda r: r["gpus"])
        # Side by side, so that points of nearly equal height remain visible.
        shift = 2 ** (0.06 * (i - (len(frameworks) - 1) / 2))
        x = [r["gpus"] * shift for r in points]
        colour = looks.palette[framework]
        lower.plot(
            x, [r["batch_time_s"] for r in points], LINES["measured"], color=colour, linewidth=1.1,
            marker=looks.markers[framework], markersize=5, markerfacecolor="white", label=framework,
        )  # fmt: skip
        for at, row in zip(x, points, strict=True):
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
    # Times of a weak scaling hardly differ, so there is room below them.
    lower.legend(
        handles=[*lower.get_legend_handles_labels()[0], dash, *rings], fontsize=6, ncols=2, loc="lower left",
        title="measured", title_fontsize=6, columnspacing=1,
    )  # fmt: skip


def tables(summary: dict[str, Any], content: Content) -> Iterator[RenderableType]:
    """Yield both panels in numbers."""
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


FIG6 = FigureKind(name="fig6", draw=draw, tables=tables, extras=extras, outputs=lambda content: [published_panel()])

if __name__ == "__main__":
    main(FIG6)
