"""Figure 3: the parts of a batch, without and with the memory optimisation. python -m plots.figures.fig3 [--fresh]"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from axonn.observability.records import Record
from axonn.training.provenance import THIS_MACHINE
from plots.figure import FigureKind, main
from plots.figure_records import Content
from plots.stacked_bars import INSIDE, NAMES, WHOLE, Stack, draw_stacks, legend
from plots.style import COLUMN_IN
from plots.summary import BUSY_MARK, device_of, elsewhere, here, machine_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASES = {"inter_layer": "inter-layer", "all_reduce": "all-reduce", "optimizer": "optimizer"}
Row = dict[str, Any]


def blocks(row: Row, bar_s: float) -> dict[str, float]:
    """Return the seconds of every block of a bar of `bar_s`, from the bottom up; they add up to it.

    The inter-layer phase of a published bar is one block. In a predicted one its compute, collectives and
    point-to-point are means over the stages, and the bubble is the rest of the phase; the blocks after it are those of
    the stage that ends last. A measured bar has the parts of its spans, means over the ranks, and what no span
    explains.
    """
    parts, phases = row["parts_s"] or {}, row["phases_s"] or {}
    if row["kind"] == "measured" and parts:
        names = ("compute", "tensor", "point_to_point", "bubble", "all_reduce", "optimizer")
        divided = {name: parts.get(name, 0.0) for name in names}
    elif set(PHASES) <= set(phases):
        after = {name: phases[name] for name in ("all_reduce", "optimizer")}
        inside = {
            "compute": parts.get("compute", 0.0),
            "tensor": parts.get("tensor_all_reduce", 0.0),
            "point_to_point": parts.get("point_to_point", 0.0),
        }
        bubble = {"bubble": phases["inter_layer"] - sum(inside.values())}
        divided = (inside | bubble if parts else {WHOLE: phases[WHOLE]}) | after
    else:
        return {"undivided": bar_s}
    divided = {name: seconds for name, seconds in divided.items() if seconds}
    return divided | {"unexplained": bar_s - sum(divided.values())}


def extras(content: Content, rows: list[Row]) -> dict[str, Any]:
    """Return the blocks of every bar in seconds, errors of predicted phases, and the unexplained share of measured
    bars."""
    bars: list[dict[str, Any]] = []
    for row in rows:
        # A bar is one run: that of several repeats which has the row's parts.
        bar_s = row["typical_s"] if row["kind"] == "measured" else row["batch_time_s"]
        named = {name: row[name] for name in ("point", "framework", "kind")} | _where(row)
        if row.get("busy"):
            named["machine_busy"] = True
        bars.append(named | {"bar_s": bar_s, "parts": {} if bar_s is None else blocks(row, bar_s)})
    published = {row["point"]: row["phases_s"] or {} for row in rows if row["kind"] == "published"}
    return {
        "parts": bars,
        "phase_errors_pct": {
            row["point"]: {
                phase: 100 * (seconds / published[row["point"]][phase] - 1)
                for phase, seconds in (row["phases_s"] or {}).items()
                if phase in published.get(row["point"], {})
            }
            for row in rows
            if row["kind"] == "predicted"
        },
        "unexplained_pct": {
            _bar_name(bar): 100 * bar["parts"]["unexplained"] / bar["bar_s"]
            for bar in bars
            if bar["kind"] == "measured" and "unexplained" in bar["parts"]
        },
    }


def _bar_name(bar: Mapping[str, Any]) -> str:
    return " on ".join([bar["point"], *_where(bar).values()]) + (BUSY_MARK if "machine_busy" in bar else "")


def _where(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the machine of a row that was measured on another than this one; otherwise nothing."""
    if row["kind"] != "measured" or here(row) or "machine" not in row:
        return {}
    return {"machine": machine_of(row)}


def _stacks(summary: dict[str, Any], order: Sequence[str], wanted: Callable[[Row], bool]) -> list[Stack]:
    """Return the bars of these points, in their order; `wanted` chooses among their rows."""
    stacks = [
        Stack(
            group=bar["point"], kind=bar["kind"], parts=bar["parts"], total=bar["bar_s"],
            repeats=_repeats(row), busy=bool(row.get("busy")), note=_extents(row["grid"]),
            label="\n".join([bar["kind"], *_where(row).values()]),
        )
        for bar, row in zip(summary["parts"], summary["rows"], strict=True)
        if bar["parts"] and bar["point"] in order and wanted(row)
    ]  # fmt: skip
    return sorted(stacks, key=lambda stack: order.index(stack.group))


def _repeats(row: Row) -> list[float]:
    """Return the times of single runs; none of a cluster's only run, which is the bar itself."""
    times: list[float] = row.get("repeats_s", [])
    return [] if _where(row) and len(times) < 2 else times


def _extents(grid: dict[str, int]) -> str:
    """Describe the extents of the pipeline and of its replicas."""
    extents = [(grid["inter"], "stage"), (grid["data"], "replica")]
    return " x ".join(f"{n} {name}{'' if n == 1 else 's'}" for n, name in extents)


def _points(summary: dict[str, Any], content: Content) -> tuple[list[str], list[str]]:
    """Return the points at the published scale, and those of this machine, in the order in which they are drawn."""
    at_scale = list(dict.fromkeys(r["point"] for r in summary["rows"] if r["kind"] != "measured"))
    runs = content.experiment.runs
    measured = [r["point"] for r in summary["rows"] if here(r)]
    local = list(dict.fromkeys([*([] if runs is None else runs.runs), *measured]))
    return at_scale, [point for point in local if point not in at_scale]


def draw(summary: dict[str, Any], content: Content) -> Figure:
    """Draw two panels one above the other, as wide as a column, with the names of the blocks between them."""
    import matplotlib.pyplot as plt

    points, here_points = _points(summary, content)
    at_scale = _stacks(summary, points, lambda row: not here(row))
    local = _stacks(summary, here_points, here)
    others = elsewhere(summary["rows"])
    on_others = [_stacks(summary, here_points, machine_rows.__contains__) for machine_rows in others.values()]
    figure, (upper, middle, lower, *more) = plt.subplots(
        3 + len(others),
        1,
        figsize=(COLUMN_IN, 7.0 + 2.7 * len(others)),
        height_ratios=[3.1, 1.0, 2.6, *[2.6] * len(others)],
        constrained_layout=True,
    )
    draw_stacks(upper, at_scale, unit="s", grouped=True)
    upper.set_ylabel("seconds per batch")
    upper.set_title(_title(content.published), fontsize=8)
    middle.axis("off")
    legend(middle, [*at_scale, *local, *(stack for stacks in on_others for stack in stacks)])
    if local:
        draw_stacks(lower, local, unit="ms", grouped=False)
        lower.set_ylabel("milliseconds per batch")
        asked = next(r.asked for r in content.measured if r.point == local[0].group and r.machine.name == THIS_MACHINE)
        lower.set_title(f"GPT of {asked.layers} layers on {asked.gpus} ranks of this machine (CPU)", fontsize=8)
    else:
        lower.axis("off")
        lower.text(0.5, 0.5, "not measured on this machine", ha="center", transform=lower.transAxes)
    for axes, stacks, ((machine, batch), machine_rows) in zip(more, on_others, others.items(), strict=True):
        draw_stacks(axes, stacks, unit="ms", grouped=False)
        axes.set_ylabel("milliseconds per batch")
        axes.set_title(
            f"{machine_rows[0]['gpus']} ranks of {machine}, batch {batch}\n({device_of(machine_rows)})", fontsize=8
        )
    figure.suptitle(fill(summary["title"], 50), fontsize=8.5)
    return figure


def _title(published: Sequence[Record]) -> str:
    if not published:
        return "At the published scale"
    first = published[0]
    model = first.asked.model.removeprefix("gpt-").upper()
    return f"GPT {model} on {first.asked.gpus} GPUs of {first.machine.name.capitalize()}"


def tables(summary: dict[str, Any], content: Content) -> Iterator[RenderableType]:
    """Yield published and predicted phases, the parts of the predicted pipeline, and the measured parts."""
    rows = summary["rows"]
    yield _phases(rows, summary["phase_errors_pct"])
    for bar in summary["parts"]:
        if bar["kind"] == "predicted":
            parts = ", ".join(f"{NAMES[name]} {bar['parts'][name]:.2f} s" for name in INSIDE if name in bar["parts"])
            yield f"{escape(bar['point'])}, predicted inter-layer phase: {parts}"
    for row in rows:
        if row["note"]:
            yield f"{escape(row['point'])}, {row['kind']}: {escape(row['note'])}"
    points, local = _points(summary, content)
    yield _measured(summary, local, "Measured", here)
    measured = [row for row in rows if row["kind"] == "measured"]
    for machine in dict.fromkeys(machine_of(row) for row in measured if row["point"] in points):
        machine_rows = [row for row in measured if machine_of(row) == machine]
        title = f"Measured on {machine} at the published scale"
        yield _measured(summary, points, title, machine_rows.__contains__)
    for (machine, batch), machine_rows in elsewhere(rows).items():
        yield _measured(summary, local, f"Measured on {machine}, batch {batch}", machine_rows.__contains__)


def _table(title: str, *columns: str) -> Table:
    """Return an empty table. Columns whose name begins with `>` are aligned on the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    return table


def _phases(rows: Sequence[Row], errors: dict[str, dict[str, float]]) -> Table:
    table = _table("Seconds of a batch by phase", "configuration", "phase", ">published", ">predicted", ">error")
    by = {(row["kind"], row["point"]): row for row in rows}
    for point in dict.fromkeys(row["point"] for row in rows if row["kind"] in ("published", "predicted")):
        published, predicted = by.get(("published", point)), by.get(("predicted", point))
        for i, (phase, name) in enumerate(PHASES.items()):
            numbers = [None if row is None else (row["phases_s"] or {}).get(phase) for row in (published, predicted)]
            error = _percent(errors.get(point, {}).get(phase))
            table.add_row(escape(point) if i == 0 else "", name, *map(_seconds, numbers), error)
        totals = [None if row is None else row["batch_time_s"] for row in (published, predicted)]
        error = _percent(None if predicted is None else predicted["error_pct"])
        table.add_row("", "batch", *map(_seconds, totals), error, end_section=True)
    return table


def _measured(summary: dict[str, Any], order: Sequence[str], title: str, wanted: Callable[[Row], bool]) -> Table:
    """Return the table of the bars of these points; `wanted` chooses among their rows."""
    table = _table(f"{title}: parts of a batch, mean over ranks and batches", "run and part", ">ms", ">of the batch")
    pairs = zip(summary["parts"], summary["rows"], strict=True)
    bars = [(bar, row) for bar, row in pairs if bar["parts"] and wanted(row)]
    for bar, row in sorted((b for b in bars if b[0]["point"] in order), key=lambda b: order.index(b[0]["point"])):
        times = row["repeats_s"]
        mark = BUSY_MARK if row["busy"] else ""
        table.add_row(
            f"{escape(bar['point'])}{mark} ({len(times)} of {1000 * min(times):.0f} to {1000 * max(times):.0f} ms)"
        )
        for name, seconds in bar["parts"].items():
            table.add_row(f"  {NAMES[name]}", f"{1000 * seconds:.1f}", f"{100 * seconds / bar['bar_s']:.1f}%")
        table.add_row("  batch", f"{1000 * bar['bar_s']:.1f}", "", end_section=True)
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}%"


FIG3 = FigureKind(name="fig3", draw=draw, tables=tables, extras=extras)

if __name__ == "__main__":
    main(FIG3)
