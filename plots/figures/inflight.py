"""The in-flight limit of the message-driven schedule, beside 1F1B. python -m plots.figures.inflight [--fresh]"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from plots.figure import FigureKind, main
from plots.figure_records import Content
from plots.style import COLUMN_IN, LINES, colours, mark
from plots.summary import BUSY_MARK, compared, here, small_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACTIVATIONS = {"predicted": "checkpoints", "measured": "activations"}
"""Entry of `axonn.observability.records.Record.memory_parts` kept for the backwards of microbatches in flight."""
DRAWN_FROM = 1.0
"""Smallest predicted limit that is drawn, in G_inter. Smaller ones leave stages idle and would hide differences."""
MARKERS = "os^D"
UNITS = {"predicted": ("GB", 1e9), "measured": ("MB", 1e6)}
"""Unit of activations, and its bytes."""


def extras(content: Content, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each limit beside 1F1B on the same work, and the best limit with no more activations than 1F1B.

    Seconds, bytes of the rank that keeps most, and percent.
    """
    rows = [r for r in rows if r["kind"] == "predicted" or here(r)]
    limits, budgets = [], []
    for kind, model in dict.fromkeys((r["kind"], r["model"]) for r in rows):
        same_work = [r for r in rows if (r["kind"], r["model"]) == (kind, model)]
        reference = next((r for r in same_work if r["schedule"]["name"] == "1f1b"), None)
        compared_limits = [
            _compared(row, _kept(row), reference, None if reference is None else _kept(reference))
            for row in same_work
            if row is not reference
        ]
        limits += compared_limits
        within = [
            x
            for x in compared_limits
            if x["activations_over_1f1b"] is not None
            and x["activations_over_1f1b"] <= 1
            and x["over_1f1b_pct"] is not None
        ]
        if within:
            best = min(within, key=lambda x: x["batch_time_s"])
            budgets.append({key: best[key] for key in ("kind", "model", "limit", "G_inter", "over_1f1b_pct")})
    return {"limits": limits, "same_budget": budgets}


def _kept(row: dict[str, Any]) -> int | None:
    """Return the bytes kept for backwards, where the record of the row has them."""
    return (row["memory_parts"] or {}).get(ACTIVATIONS[row["kind"]])


def _compared(
    row: dict[str, Any], kept: int | None, reference: dict[str, Any] | None, budget: int | None
) -> dict[str, Any]:
    """Return a limit's numbers, and their ratios to those of 1F1B, the spread of whose repeats is included."""
    spread = row.get("repeats_s") or [row["batch_time_s"]]
    base = None if reference is None or not compared(row, reference) else reference["batch_time_s"]
    return {
        "point": row["point"],
        "kind": row["kind"],
        "model": row["model"],
        # Without one, the engine's default.
        "limit": row["schedule"].get("in_flight_limit") or 2 * row["grid"]["inter"],
        "G_inter": row["grid"]["inter"],
        "batch_time_s": row["batch_time_s"],
        **({"machine_busy": True} if row.get("busy") else {}),
        "activation_bytes": kept,
        "activation_bytes_of_1f1b": budget,
        "over_1f1b_pct": None if base is None else 100 * (row["batch_time_s"] / base - 1),
        "repeats_over_1f1b_pct": [] if base is None else [100 * (t / base - 1) for t in spread],
        "spread_of_1f1b_pct": []
        if base is None or reference is None
        else [100 * (t / base - 1) for t in reference.get("repeats_s", [])],
        "activations_over_1f1b": None if not kept or not budget else kept / budget,
    }


def draw(summary: dict[str, Any], content: Content) -> Figure:
    """Draw time and activations over the limit; above predicted, below measured."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(COLUMN_IN, 3.7), constrained_layout=True, sharex=True)
    models = list(dict.fromkeys(x["model"] for x in summary["limits"]))
    palette = dict(zip(models, colours(max(1, len(models))), strict=False))
    for (time, memory), kind in zip(panels, ("predicted", "measured"), strict=True):
        _panels(time, memory, [x for x in summary["limits"] if x["kind"] == kind], kind, palette)
    for axes in panels[1]:
        axes.set_xlabel(r"in-flight limit / $G_{inter}$")
    figure.suptitle(summary["title"], fontsize=8.5)
    return figure


def _panels(
    time: Axes, memory: Axes, limits: Sequence[dict[str, Any]], kind: str, palette: dict[str, tuple[float, ...]]
) -> None:
    """Draw the two panels of one kind of points."""
    for axes in (time, memory):
        axes.set_title(kind, fontsize=7.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
        axes.minorticks_off()
        axes.tick_params(labelsize=6.5)
    if not limits:
        time.text(0.5, 0.5, f"not {kind}", ha="center", transform=time.transAxes, fontsize=7)
        return
    for (model, colour), marker in zip(palette.items(), cycle(MARKERS), strict=False):
        of_model = sorted((x for x in limits if x["model"] == model), key=lambda x: x["limit"])
        _draw_times(time, of_model, kind, colour, marker)
        _draw_activations(memory, of_model, kind, colour, marker)
    time.axhline(0, color="0.25", linewidth=0.8)
    time.text(0.98, 0, "1F1B", ha="right", va="bottom", fontsize=5.5, transform=time.get_yaxis_transform())
    hidden = [x["over_1f1b_pct"] for x in limits if kind == "predicted" and x["limit"] / x["G_inter"] < DRAWN_FROM]
    if hidden:
        note = f"at 0.5:\n{min(hidden):+.0f} to\n{max(hidden):+.0f}%"
        time.text(0.47, 0.03, note, ha="left", va="bottom", fontsize=5.5, transform=time.get_xaxis_transform())
    _finish_axes(time, memory, kind)


def _draw_times(
    time: Axes, limits: Sequence[dict[str, Any]], kind: str, colour: tuple[float, ...], marker: str
) -> None:
    """Draw a model's times over 1F1B's: medians, single runs, and the spread of 1F1B's own runs."""
    drawn = [
        x
        for x in limits
        if x["over_1f1b_pct"] is not None and (kind == "measured" or x["limit"] / x["G_inter"] >= DRAWN_FROM)
    ]
    if drawn:
        at = [x["limit"] / x["G_inter"] for x in drawn]
        time.plot(
            at, [x["over_1f1b_pct"] for x in drawn], LINES[kind], color=colour, linewidth=1,
            marker=marker, markersize=3.5, markerfacecolor="white",
        )  # fmt: skip
        busy = [(limit, x["over_1f1b_pct"]) for limit, x in zip(at, drawn, strict=True) if x.get("machine_busy")]
        mark(time, [limit for limit, _ in busy], [percent for _, percent in busy], "busy")
        for limit, x in zip(at, drawn, strict=True):
            repeats = x["repeats_over_1f1b_pct"]
            if len(repeats) > 1:
                time.plot([limit] * len(repeats), repeats, "_", color=colour, markersize=5)
    spread = next((x["spread_of_1f1b_pct"] for x in limits if len(x["spread_of_1f1b_pct"]) > 1), None)
    if spread:
        time.axhspan(min(spread), max(spread), color="0.85", linewidth=0, zorder=0.5)


def _draw_activations(
    memory: Axes, limits: Sequence[dict[str, Any]], kind: str, colour: tuple[float, ...], marker: str
) -> None:
    """Draw a model's activations, and those of 1F1B as a line."""
    _, size = UNITS[kind]
    kept = [(x["limit"] / x["G_inter"], x["activation_bytes"] / size) for x in limits if x["activation_bytes"]]
    if kept:
        memory.plot(
            *zip(*kept, strict=True), LINES[kind], color=colour, linewidth=1, label=_short(limits[0]["model"]),
            marker=marker, markersize=3.5, markerfacecolor="white",
        )  # fmt: skip
    budgets = {x["activation_bytes_of_1f1b"] / size for x in limits if x["activation_bytes_of_1f1b"]}
    for budget in budgets:
        memory.axhline(budget, color=colour, linewidth=0.6)
        memory.text(4.4, budget, "1F1B", ha="right", va="bottom", fontsize=5.5)


def _finish_axes(time: Axes, memory: Axes, kind: str) -> None:
    """Set scales, limits, labels and the legend, once everything is drawn."""
    from matplotlib.ticker import LogLocator

    unit, _ = UNITS[kind]
    memory.set_yscale("log", base=2)
    memory.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    memory.set_xlim(0.44, 4.5)
    low, high = memory.get_ylim()
    memory.set_ylim(low / (high / low) ** 0.45, high)
    memory.yaxis.set_major_locator(LogLocator(base=4))
    time.margins(y=0.12)
    time.set_ylabel("batch time over 1F1B's, %", fontsize=6.5)
    memory.set_ylabel(f"{unit} of activations per rank", fontsize=6.5)
    if memory.get_legend_handles_labels()[0]:
        memory.legend(fontsize=5.3, loc="lower right", handlelength=2, borderpad=0.3, labelspacing=0.3)


def _short(model: str) -> str:
    """Return the name of a model in the legend."""
    size, _, rest = model.removeprefix("gpt-").partition("-")
    return size.upper().replace("X", " x ") + (", no head" if rest else "")


def tables(summary: dict[str, Any], content: Content) -> Iterator[RenderableType]:
    """Yield each limit in numbers, and the comparison at 1F1B's activations."""
    table = small_table(
        "Message-driven over 1F1B on the same work",
        "model",
        "limit",
        "/ G",
        "seconds",
        "time",
        "memory",
    )
    for x in summary["limits"]:
        over, kept = x["over_1f1b_pct"], x["activations_over_1f1b"]
        table.add_row(
            f"{x['model']} ({x['kind']}){BUSY_MARK if x.get('machine_busy') else ''}",
            str(x["limit"]),
            f"{x['limit'] / x['G_inter']:g}",
            f"{x['batch_time_s']:.4g}",
            "-" if over is None else f"{over:+.2f}%",
            "-" if kept is None else f"x {kept:.2f}",
        )
    yield table
    for x in summary["same_budget"]:
        yield (
            f"at 1F1B's activations, {x['kind']}, {x['model']}: the fastest limit is {x['limit']} "
            f"({x['limit'] / x['G_inter']:g} G_inter), {x['over_1f1b_pct']:+.2f}% of 1F1B's batch time"
        )


INFLIGHT = FigureKind(name="inflight", draw=draw, tables=tables, extras=extras)

if __name__ == "__main__":
    main(INFLIGHT)
