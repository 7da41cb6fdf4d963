"""Pipeline phase over G_inter (Figure 5 of IPDPS 2022). python -m plots.figures.ginter [--fresh]"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from plots.figure import FigureKind, main
from plots.figure_records import Content
from plots.style import COLUMN_IN, colours
from plots.summary import small_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("compute", "point_to_point", "bubble")
HATCH = "////"
"""Hatching of predicted bars."""


def extras(content: Content, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the pipeline phase of each point by kind, the predicted one split, and the errors. Seconds, percent."""
    phases = []
    for point in dict.fromkeys(row["point"] for row in rows):
        by_kind = {row["kind"]: row for row in rows if row["point"] == point}
        published, predicted = (_phase(by_kind.get(kind)) for kind in ("published", "predicted"))
        phase: dict[str, Any] = {
            "point": point,
            "G_inter": next(iter(by_kind.values()))["grid"]["inter"],
            "published_s": published,
            "predicted_s": predicted,
            "error_pct": None if published is None or predicted is None else 100 * (predicted / published - 1),
            "predicted_parts_s": None,
        }
        if predicted is not None:
            parts = by_kind["predicted"]["parts_s"]
            computing, waiting = parts["compute"] + parts["tensor_all_reduce"], parts["point_to_point"]
            phase["predicted_parts_s"] = {
                "compute": computing,
                "point_to_point": waiting,
                "bubble": predicted - computing - waiting,
            }
        phases.append(phase)
    errors = [abs(p["error_pct"]) for p in phases if p["error_pct"] is not None]
    return {"pipeline_phase": phases, "phase_mape_pct": mean(errors) if errors else None}


def _phase(row: dict[str, Any] | None) -> float | None:
    return None if row is None or row["phases_s"] is None else row["phases_s"]["inter_layer"]


def draw(summary: dict[str, Any], content: Content) -> Figure:
    """Draw two bars for each G_inter: published, and predicted in parts."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    phases = sorted(summary["pipeline_phase"], key=lambda p: p["G_inter"])
    palette = dict(zip(PARTS, colours(3), strict=True))
    figure, axes = plt.subplots(figsize=(COLUMN_IN, 2.5), constrained_layout=True)
    width = 0.38
    for i, phase in enumerate(phases):
        if phase["published_s"] is not None:
            axes.bar(i - width / 2, phase["published_s"], width * 0.92, color="0.55", linewidth=0)
            axes.text(i - width / 2, phase["published_s"] + 0.7, f"{phase['published_s']:.1f}", ha="center", fontsize=6)
        if phase["predicted_s"] is not None:
            bottom = 0.0
            for part in PARTS:
                seconds = phase["predicted_parts_s"][part]
                axes.bar(
                    i + width / 2, seconds, width * 0.92, bottom=bottom, color=palette[part], hatch=HATCH,
                    edgecolor="white", linewidth=0,
                )  # fmt: skip
                bottom += seconds
            axes.text(i + width / 2, bottom + 0.7, f"{bottom:.1f}", ha="center", fontsize=6)
    handles = [Patch(facecolor="0.55", label="published")] + [
        Patch(
            facecolor=palette[part], hatch=HATCH, edgecolor="white", linewidth=0,
            label=f"predicted: {part.replace('_', '-')}",
        )
        for part in PARTS
    ]  # fmt: skip
    axes.legend(handles=handles, fontsize=6.5, loc="upper left", ncols=1)
    axes.set_xticks(range(len(phases)), [str(p["G_inter"]) for p in phases])
    most = max((p[k] for p in phases for k in ("published_s", "predicted_s") if p[k] is not None), default=1.0)
    axes.set_ylim(0, 1.18 * most)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel=r"$G_{inter}$, on 48 GPUs of Summit", ylabel="seconds of the pipeline phase")
    axes.set_title(summary["title"], fontsize=8.5)
    return figure


def tables(summary: dict[str, Any], content: Content) -> Iterator[RenderableType]:
    """Yield published and predicted phases, with the predicted parts."""
    table = small_table(
        "Pipeline phase in seconds", "G_inter", "published", "predicted", "error", "compute", "p2p", "bubble"
    )
    for phase in summary["pipeline_phase"]:
        parts = phase["predicted_parts_s"] or {}
        table.add_row(
            str(phase["G_inter"]),
            *("-" if phase[k] is None else f"{phase[k]:.2f}" for k in ("published_s", "predicted_s")),
            "-" if phase["error_pct"] is None else f"{phase['error_pct']:+.1f}%",
            *(f"{parts[part]:.2f}" if parts else "-" for part in PARTS),
        )
    yield table
    if summary["phase_mape_pct"] is not None:
        yield f"mean absolute error of the predictions: {summary['phase_mape_pct']:.1f}%"


GINTER = FigureKind(name="ginter", draw=draw, tables=tables, extras=extras)

if __name__ == "__main__":
    main(GINTER)
