"""The in-flight limit of the message-driven schedule, beside 1F1B. python -m plots.figures.inflight [--fresh]"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from plots.figure import Content, FigureKind, main
from plots.style import COLUMN_IN, KIND_LINES, colours, mark
from plots.summary import BUSY_MARK, compared, here, small_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACTIVATIONS = {"predicted": "checkpoints", "measured": "activations"}
"""Of `axonn.observability.records.Record.memory_parts`: what is kept for the backwards of microbatches in flight."""
DRAWN_FROM = 1.0
"""Predicted limits below so many G_inter leave stages idle, and would hide the differences of the others."""
MARKERS = "os^D"


def extras(content: Content, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each limit beside 1F1B on the same work, and the best limit whose activations are no more than 1F1B's.

    Seconds, bytes of the rank that keeps most, and percent.
    """
    rows = [r for r in rows if r["kind"] == "predicted" or here(r)]
    limits, budgets = [], []
    for kind, model in dict.fromkeys((r["kind"], r["model"]) for r in rows):
        mine = [r for r in rows if (r["kind"], r["model"]) == (kind, model)]
        reference = next((r for r in mine if r["schedule"]["name"] == "1f1b"), None)
        own = [
            _compared(row, _kept(row), reference, None if reference is None else _kept(reference))
            for row in mine
            if row is not reference
        ]
        limits += own
        within = [
            x
            for x in own
            if x["activations_over_1f1b"] is not None
            and x["activations_over_1f1b"] <= 1
            and x["over_1f1b_pct"] is not None
        ]
        if within:
            best = min(within, key=lambda x: x["batch_time_s"])
            budgets.append({key: best[key] for key in ("kind", "model", "limit", "G_inter", "over_1f1b_pct")})
    return {"limits": limits, "same_budget": budgets}


def _kept(row: dict[str, Any]) -> int | None:
    """Bytes of what is kept for backwards, where the record of the row says so."""
    return (row["memory_parts"] or {}).get(ACTIVATIONS[row["kind"]])


def _compared(
    row: dict[str, Any], kept: int | None, reference: dict[str, Any] | None, budget: int | None
) -> dict[str, Any]:
    """A limit, and what it is beside 1F1B, whose spread are its own repeats."""
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
    """Time and activations over the limit; above predicted, below measured."""
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
    """Those of one kind."""
    from matplotlib.ticker import LogLocator

    for axes in (time, memory):
        axes.set_title(kind, fontsize=7.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
        axes.minorticks_off()
        axes.tick_params(labelsize=6.5)
    if not limits:
        time.text(0.5, 0.5, f"not {kind}", ha="center", transform=time.transAxes, fontsize=7)
        return
    unit, size = ("GB", 1e9) if kind == "predicted" else ("MB", 1e6)
    for i, (model, colour) in enumerate(palette.items()):
        mine = sorted((x for x in limits if x["model"] == model), key=lambda x: x["limit"])
        marker = {"marker": MARKERS[i % len(MARKERS)], "markersize": 3.5, "markerfacecolor": "white"}
        drawn = [
            x
            for x in mine
            if x["over_1f1b_pct"] is not None and (kind == "measured" or x["limit"] / x["G_inter"] >= DRAWN_FROM)
        ]
        if drawn:
            at = [x["limit"] / x["G_inter"] for x in drawn]
            time.plot(
                at,
                [x["over_1f1b_pct"] for x in drawn],
                KIND_LINES[kind],
                color=colour,
                linewidth=1,
                **marker,
            )
            busy = [(where, x["over_1f1b_pct"]) for where, x in zip(at, drawn, strict=True) if x.get("machine_busy")]
            mark(time, [where for where, _ in busy], [percent for _, percent in busy], "busy")
            for where, x in zip(at, drawn, strict=True):
                each = x["repeats_over_1f1b_pct"]
                if len(each) > 1:
                    time.plot([where] * len(each), each, "_", color=colour, markersize=5)
        kept = [(x["limit"] / x["G_inter"], x["activation_bytes"] / size) for x in mine if x["activation_bytes"]]
        if kept:
            memory.plot(
                *zip(*kept, strict=True), KIND_LINES[kind], color=colour, linewidth=1, label=_short(model),
                **marker,
            )  # fmt: skip
        budgets = {x["activation_bytes_of_1f1b"] / size for x in mine if x["activation_bytes_of_1f1b"]}
        for budget in budgets:
            memory.axhline(budget, color=colour, linewidth=0.6)
            memory.text(4.4, budget, "1F1B", ha="right", va="bottom", fontsize=5.5)
        spread = next((x["spread_of_1f1b_pct"] for x in mine if len(x["spread_of_1f1b_pct"]) > 1), None)
        if spread:
            time.axhspan(min(spread), max(spread), color="0.85", linewidth=0, zorder=0.5)
    time.axhline(0, color="0.25", linewidth=0.8)
    time.text(0.98, 0, "1F1B", ha="right", va="bottom", fontsize=5.5, transform=time.get_yaxis_transform())
    hidden = [x["over_1f1b_pct"] for x in limits if kind == "predicted" and x["limit"] / x["G_inter"] < DRAWN_FROM]
    if hidden:
        said = f"at 0.5:\n{min(hidden):+.0f} to\n{max(hidden):+.0f}%"
        time.text(0.47, 0.03, said, ha="left", va="bottom", fontsize=5.5, transform=time.get_xaxis_transform())
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
    """As in the legend."""
    size, _, rest = model.removeprefix("gpt-").partition("-")
    return size.upper().replace("X", " x ") + (", no head" if rest else "")


def tables(summary: dict[str, Any], content: Content) -> Iterator[RenderableType]:
    """Each limit in numbers, and the comparison at 1F1B's activations."""
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
