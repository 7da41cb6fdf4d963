"""Training loss on a grid and on one rank, and the published curves. python -m plots.figures.loss [--fresh]"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from axonn.training.provenance import THIS_MACHINE
from plots.figure import FigureKind, main
from plots.figure_records import Content
from plots.published_tables import column, read_reading
from plots.style import COLUMN_IN, LINES, colours, mark
from plots.summary import small_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {"axonn": "AxoNN", "pytorch": "PyTorch"}
SERIAL = "1 rank"
"""The run that the others are compared with."""
WIDTHS = (2.6, 1.9, 1.3, 0.8, 0.5)
"""Widths of lines that lie on each other."""


def extras(content: Content, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the losses of every run and their relative differences from the serial one, and the published curves with
    their differences at the first point and later on."""
    local = [r for r in content.measured if r.machine.name == THIS_MACHINE]
    losses = {r.point: r.losses for r in local if r.failure is None}
    serial = losses.get(SERIAL, [])
    differences = {
        point: [abs(a - b) / abs(a) for a, b in zip(serial, curve, strict=False)]
        for point, curve in losses.items()
        if point != SERIAL
    }
    published = {}
    for name, label in LABELS.items():
        table = read_reading(content.experiment, name)
        published[label] = {"batch": column(table, "batch"), "loss": column(table, "loss"), "suspect_batches": [0.0]}
    axonn, pytorch = (published[label] for label in LABELS.values())
    published_differences = [
        {
            "batch": batch,
            "difference_pct": 100 * (_at(axonn["batch"], axonn["loss"], batch) / loss - 1),
            "suspect": batch in axonn["suspect_batches"],
        }
        for batch, loss in zip(pytorch["batch"], pytorch["loss"], strict=True)
    ]
    return {
        "losses": losses,
        "relative_differences": differences,
        "largest_difference": {point: max(curve, default=None) for point, curve in differences.items()},
        "published_losses": published,
        "published_apart_pct": published_differences,
        "suspect": [f"{label}: the loss of batch 0 is {curve['loss'][0]:.2f}" for label, curve in published.items()],
    }


def _at(batches: Sequence[float], losses: Sequence[float], batch: float) -> float:
    """Return the loss at a batch, interpolated between the two nearest points read off."""
    after = bisect_right(batches, batch)
    if after in (0, len(batches)):
        return losses[min(after, len(losses) - 1)]
    share = (batch - batches[after - 1]) / (batches[after] - batches[after - 1])
    return losses[after - 1] + share * (losses[after] - losses[after - 1])


def draw(summary: dict[str, Any], content: Content) -> Figure:
    """Draw losses here, their differences from the serial run's, and the published curves."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplot_mosaic(
        [["here", "published"], ["difference", "published"]], figsize=(COLUMN_IN, 3.0), constrained_layout=True
    )
    _here(panels["here"], panels["difference"], summary, _tolerance(summary))
    _published(panels["published"], summary)
    for axes in panels.values():
        axes.tick_params(labelsize=6.5)
    figure.suptitle(summary["title"], fontsize=8.5)
    return figure


def _tolerance(summary: dict[str, Any]) -> float | None:
    return None if summary["policy"] is None else summary["policy"]["loss_tolerance"]


def _here(losses: Axes, differences: Axes, summary: dict[str, Any], tolerance: float | None) -> None:
    points = sorted(summary["losses"], key=lambda point: (point != SERIAL, point))
    palette = dict(zip(points, colours(max(1, len(points))), strict=False))
    for i, point in enumerate(points):
        curve = summary["losses"][point]
        losses.plot(
            range(len(curve)), curve, LINES["measured"], color=palette[point],
            linewidth=WIDTHS[i % len(WIDTHS)], label=_called(point),
        )  # fmt: skip
        nonzero = [(n, d) for n, d in enumerate(summary["relative_differences"].get(point, [])) if d]
        if nonzero:
            differences.plot(*zip(*nonzero, strict=True), ".", color=palette[point], markersize=1.8)
    exact = [point for point, curve in summary["relative_differences"].items() if curve and not any(curve)]
    if points:
        losses.legend(fontsize=5.2, loc="upper right", handlelength=1.6, labelspacing=0.2, borderpad=0.3)
    else:
        losses.text(0.5, 0.5, "not measured", ha="center", transform=losses.transAxes, fontsize=7)
    losses.set_title("here (measured)", fontsize=7)
    losses.set_ylabel("loss", fontsize=6.5)
    differences.set_yscale("log")
    differences.set_ylim(1e-9, 1e-3)
    differences.set_yticks([1e-8, 1e-6, 1e-4])
    differences.minorticks_off()
    if tolerance is not None:
        differences.axhline(tolerance, color="0.25", linewidth=0.8)
        differences.text(
            0.98, tolerance * 1.3, "tolerance", ha="right", va="bottom", fontsize=5.2,
            transform=differences.get_yaxis_transform(),
        )  # fmt: skip
    if exact:
        note = f"{', '.join(map(_called, exact))}: no difference"
        differences.text(0.98, 0.04, note, ha="right", fontsize=5.2, transform=differences.transAxes)
    differences.set_xlabel("batch", fontsize=6.5)
    differences.set_ylabel("relative difference", fontsize=6.5)


def _called(point: str) -> str:
    """Return the name of a point, with the axis as a subscript."""
    name, _, extent = point.partition(" ")
    head, _, axis = name.partition("_")
    return rf"${head}_{{{axis}}}$ {extent}" if axis else point


def _published(axes: Axes, summary: dict[str, Any]) -> None:
    for i, (label, curve) in enumerate(summary["published_losses"].items()):
        colour = colours(len(LABELS))[i]
        axes.plot(curve["batch"], curve["loss"], LINES["published"], color=colour, linewidth=(1.8, 0.8)[i], label=label)
        axes.plot(curve["batch"][0], curve["loss"][0], "o^"[i], color=colour, markersize=4)
        suspect = [n for n in curve["batch"] if n in curve["suspect_batches"]]
        mark(axes, suspect, [curve["loss"][curve["batch"].index(n)] for n in suspect], "suspect")
        axes.annotate(
            f"{curve['loss'][0]:.2f}", (curve["batch"][0], curve["loss"][0]), textcoords="offset points",
            xytext=(6, (0, 2)[i]), fontsize=5.5,
        )  # fmt: skip
    axes.text(
        0.97,
        0.7,
        "suspect (squares): should\nstart from the same loss",
        ha="right",
        fontsize=5.5,
        transform=axes.transAxes,
    )
    axes.legend(fontsize=5.5, loc="upper right")
    axes.set_title("IPDPS 2022 (published)", fontsize=7)
    axes.set_xlabel("batch", fontsize=6.5)


def tables(summary: dict[str, Any], content: Content) -> Iterator[RenderableType]:
    """Yield first and last losses, and the largest difference from the serial run."""
    table = small_table("Training loss (measured)", "", "first", "last", "largest relative difference")
    for point, curve in summary["losses"].items():
        largest = summary["largest_difference"].get(point)
        table.add_row(point, f"{curve[0]:.4f}", f"{curve[-1]:.4f}", "-" if largest is None else f"{largest:.1e}")
    yield table
    for line in summary["suspect"]:
        yield f"suspect among the published curves: {line}"


LOSS = FigureKind(name="loss", draw=draw, tables=tables, extras=extras)

if __name__ == "__main__":
    main(LOSS)
