"""The panels of Figure 7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from axonn.grid import AXES
from axonn.training.provenance import THIS_MACHINE
from experiments.definition import OURS
from plots.figure_records import Content
from plots.style import LINES, PAGE_IN, colours, mark, mark_handle
from plots.summary import at_scale, device_of, elsewhere, here, machine_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS_2D = f"{OURS}, our tensor parallelism (row x col)"
SCHEME = "our engine with G_row = 1 (Megatron-LM's scheme)"
EVERYTHING = "+".join(AXES)
"""Name of the axis of messages to all ranks at once."""
SMALL = 6.0
"""Font size of text inside a panel, points."""
MARKERS = {OURS: "o", SCHEME: "^"}
GB, MB = 1e9, 1e6


def bytes_along(row: Mapping[str, Any], axis: str) -> int:
    """Return the bytes that a row's rank sends along an axis; 0 where nothing was sent."""
    return int((row["bytes_per_batch"] or {}).get(axis, 0))


def axis_of(name: str) -> str:
    """Return the name of an axis in the summary."""
    return "all" if name == EVERYTHING else name


def draw(summary: dict[str, Any], content: Content) -> Figure:
    """Draw time, speedup and bytes at the published scale above, time and bytes here below. As wide as a page."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    palette = dict(zip((OURS, SCHEME), colours(2), strict=True))
    on_others = elsewhere(summary["rows"])
    figure = plt.figure(figsize=(PAGE_IN, 5.6 + 2.5 * len(on_others)), constrained_layout=True)
    grid = figure.add_gridspec(2 + len(on_others), 6, height_ratios=(1.15, 1, *[1] * len(on_others)))
    upper = [figure.add_subplot(grid[0, 2 * i : 2 * i + 2]) for i in range(3)]
    lower = [figure.add_subplot(grid[1 + j, 3 * i : 3 * i + 3]) for j in range(1 + len(on_others)) for i in range(2)]
    main_family = [r for r in summary["per_gpu"] if r["image_size"] == 32]
    _draw_times(upper[0], main_family, palette)
    _draw_measured_times(upper[0], main_family, summary["rows"], palette)
    _draw_speedups(upper[1], summary["speedups"], palette[OURS])
    _draw_bytes(upper[2], main_family, palette)
    _draw_here(lower[:2], summary, content, palette)
    for i, ((machine, _), rows) in enumerate(on_others.items(), start=1):
        panels = lower[2 * i : 2 * i + 2]
        _title_here(panels, f"on {machine} ({device_of(rows)})", "there")
        _draw_small(panels, rows, bytes_by_point(summary, machine), content, palette)
    for letter, axes in zip(ascii_lowercase, [*upper, *lower], strict=False):
        axes.set_title(f"({letter}) {axes.get_title()}", fontsize=7.5)
        axes.tick_params(labelsize=6.5)
        axes.xaxis.label.set_fontsize(7)
        axes.yaxis.label.set_fontsize(7)
    handles: list[Any] = [Patch(color=palette[OURS], label=OURS_2D), Patch(color=palette[SCHEME], label=SCHEME)]
    handles += [
        Line2D([], [], color="0.25", linestyle=LINES["predicted"], marker="o", markersize=4, markerfacecolor="white",
               label="predicted"),
        Line2D([], [], color="black", marker="*", markersize=8, linewidth=0, label="published (a ratio, no time)"),
        Line2D([], [], color="0.25", marker="_", markersize=8, linewidth=0, label="measured: runs (bar: median)"),
    ]  # fmt: skip
    if any(r.get("busy") for r in summary["rows"]):
        handles.append(mark_handle("busy"))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=3, fontsize=6.5, frameon=False, title=summary["title"],
        title_fontsize=9,
    )  # fmt: skip
    return figure


def _gpus_axis(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Set the ticks: GPUs, doubling, with the number of parameters below."""
    names = {r["gpus"]: f"{r['gpus']}\n{_billions(r)}" for r in rows}
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(names), list(names.values()))
    axes.minorticks_off()
    if names:
        axes.set_xlim(min(names) / 1.35, max(names) * 1.45)
    axes.set_xlabel("A100 GPUs of Perlmutter, parameters")


def _billions(row: Mapping[str, Any]) -> str:
    """Return the number of parameters, as the model's name has it."""
    name = str(row["model"])
    return name.split("-")[1].upper() if "-" in name else name.partition(" ")[0]


def _draw_times(axes: Axes, rows: Sequence[Mapping[str, Any]], palette: Mapping[str, Any]) -> None:
    for framework, marker in MARKERS.items():
        points = sorted((r["gpus"], r["batch_time_s"]) for r in rows if r["framework"] == framework)
        if points:
            axes.plot(
                *zip(*points, strict=True), LINES["predicted"], color=palette[framework], marker=marker, markersize=5,
                markerfacecolor="white", linewidth=1.2,
            )  # fmt: skip
    _gpus_axis(axes, rows)
    axes.set_ylim(bottom=0)
    axes.set(ylabel="seconds per batch", title="Batch time, predicted (32 pixels)")


def _draw_measured_times(
    axes: Axes, drawn: Sequence[Mapping[str, Any]], rows: Sequence[dict[str, Any]], palette: Mapping[str, Any]
) -> None:
    """Draw times measured on clusters, beside the predicted ones of the same networks."""
    models = {r["model"] for r in drawn}
    measured = [r for r in rows if r["kind"] == "measured" and at_scale(rows, r) and r["model"] in models]
    machines = list(dict.fromkeys(machine_of(r) for r in measured))
    for framework, marker in MARKERS.items():
        for machine in machines:
            points = sorted(
                (r["gpus"], r["batch_time_s"])
                for r in measured
                if (r["framework"], machine_of(r)) == (framework, machine)
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True), LINES["measured"], color=palette[framework], marker=marker,
                    markersize=5, markerfacecolor="white", linewidth=1.2,
                )  # fmt: skip
    busy = [r for r in measured if r["busy"]]
    mark(axes, [r["gpus"] for r in busy], [r["batch_time_s"] for r in busy], "busy")
    if machines:
        axes.set(title=f"Batch time (32 pixels): dashed predicted,\ndotted measured on {', '.join(machines)}")
        axes.set_ylim(bottom=0, top=1.08 * max(r["batch_time_s"] for r in [*drawn, *measured]))


def _draw_speedups(axes: Axes, speedups: Sequence[Mapping[str, Any]], colour: Any) -> None:
    """Draw the published speedup as a single star, and two predicted families of networks, the second fainter."""
    families = {32: ("32-pixel networks", "o", 1.0, 1.2), 128: ("128-pixel networks", "s", 0.55, 0.8)}
    rows = [s for s in speedups if s["kind"] == "predicted"]
    for size, (label, marker, alpha, width) in families.items():
        points = sorted((s["gpus"], s["value"]) for s in rows if s["image_size"] == size)
        if not points:
            continue
        axes.plot(
            *zip(*points, strict=True), LINES["predicted"], color=colour, marker=marker, markersize=4.5, alpha=alpha,
            markerfacecolor="white", linewidth=width, zorder=3, label=f"{label}, predicted",
        )  # fmt: skip
        for gpus, value in points:
            # Below the lower line and left of the upper one.
            place, side = ((0, -10), "center") if size == 32 else ((-6, 0), "right")
            axes.annotate(
                f"{value:.2f}", (gpus, value), place, textcoords="offset points", fontsize=SMALL, ha=side,
                color="0.15" if size == 32 else "0.4",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
            )  # fmt: skip
    for s in speedups:
        if s["kind"] == "published":
            axes.plot([s["gpus"]], [s["value"]], "*", color="black", markersize=11, zorder=2)
            axes.annotate(
                f"{s['value']:g} published", (s["gpus"], s["value"]), (8, 7), textcoords="offset points",
                fontsize=SMALL, ha="right",
            )  # fmt: skip
    axes.axhline(1, color="0.4", linewidth=0.8)
    _gpus_axis(axes, [s for s in rows if s["image_size"] == 32] or speedups)
    axes.set_ylim(0, 3)
    axes.set(ylabel="times as fast as G_row = 1", title="Speedup over the scheme")
    if rows:
        axes.legend(fontsize=5.5, loc="lower left")


def _draw_bytes(axes: Axes, rows: Sequence[Mapping[str, Any]], palette: Mapping[str, Any]) -> None:
    """Draw pairs of stacked bars: along row and col below, along data (hatched) above; the grid over each."""
    from matplotlib.patches import Patch

    sizes = sorted({r["gpus"] for r in rows})
    highest = max(((r["tensor_bytes"] + r["data_bytes"]) / GB for r in rows), default=1.0)
    for row in rows:
        at = sizes.index(row["gpus"]) + (-0.21 if row["framework"] == OURS else 0.21)
        tensor, data = row["tensor_bytes"] / GB, row["data_bytes"] / GB
        colour = palette[row["framework"]]
        axes.bar(at, tensor, 0.38, color=colour, linewidth=0)
        axes.bar(at, data, 0.38, bottom=tensor, facecolor="white", edgecolor=colour, hatch="//////", linewidth=0.5)
        g = row["grid"]
        axes.text(
            at, tensor + data + 0.015 * highest, f"{g['data']} x {g['row']} x {g['col']}", fontsize=5.5, rotation=90,
            ha="center", va="bottom",
        )  # fmt: skip
    named = {r["gpus"]: _billions(r) for r in rows}
    axes.set_xticks(range(len(sizes)), [f"{gpus}\n{named[gpus]}" for gpus in sizes])
    axes.set_ylim(0, 1.5 * highest)
    axes.grid(visible=False, axis="x")
    axes.set(
        xlabel="A100 GPUs of Perlmutter, parameters",
        ylabel="GB that a GPU sends per batch",
        title="Bytes, predicted (32 pixels)",
    )
    handles = [
        Patch(color="0.5", label="along row and col"),
        Patch(facecolor="white", edgecolor="0.5", hatch="//////", label="along data"),
        Patch(facecolor="none", edgecolor="none", label="over bars: data x row x col"),
    ]
    axes.legend(handles=handles, fontsize=5.5, loc="upper left", handlelength=1.4)


def _draw_here(
    panels: Sequence[Axes], summary: Mapping[str, Any], content: Content, palette: Mapping[str, Any]
) -> None:
    """Draw the points of this machine."""
    rows = measured_here(summary)
    cores = next((r.machine.cores for r in content.measured if r.machine.name == THIS_MACHINE), None)
    _title_here(panels, "on this machine" + (f" ({cores} cores for all ranks)" if cores else ""), "here")
    if not rows:
        for axes in panels:
            axes.text(0.5, 0.5, "not measured on this machine", ha="center", transform=axes.transAxes, fontsize=7)
        return
    _draw_small(panels, rows, bytes_by_point(summary, None), content, palette)


def _title_here(panels: Sequence[Axes], where: str, counted: str) -> None:
    """Set titles and labels of the panels of one machine."""
    times, sent = panels
    times.set(ylabel="seconds per batch", title=f"Batch time, measured {where}")
    sent.set(ylabel="MB that a rank sends per batch", title=f"Communication, counted {counted} and modelled")


def bytes_by_point(summary: Mapping[str, Any], machine: str | None) -> dict[str, Mapping[str, Any]]:
    """Return the bytes by point, of runs on this machine (None) or another."""
    return {b["point"]: b for b in summary["bytes_here"] if b.get("machine") == machine}


def _draw_small(
    panels: Sequence[Axes],
    rows: Sequence[Mapping[str, Any]],
    by_point: Mapping[str, Mapping[str, Any]],
    content: Content,
    palette: Mapping[str, Any],
) -> None:
    """Draw seconds, and bytes along row and col, counted (bars) and modelled (crosses), over the tensor grid."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    times, sent = panels
    rows = sorted(rows, key=lambda r: (r["gpus"], r["grid"]["row"]))
    shades = {"row": 1.0, "col": 0.45}
    for i, row in enumerate(rows):
        colour = palette[SCHEME if row["grid"]["row"] == 1 else OURS]
        times.bar(i, row["batch_time_s"], 0.6, facecolor="white", edgecolor=colour, linewidth=1.2)
        times.plot([i] * len(row["repeats_s"]), row["repeats_s"], "_", color=colour, markersize=11)
        if row["busy"]:
            mark(times, [i], [row["batch_time_s"]], "busy")
        sizes = by_point.get(row["point"], {"counted": {}, "modelled": {}})
        below = modelled = 0.0
        for axis, alpha in shades.items():
            size = sizes["counted"].get(axis, 0) / MB
            sent.bar(i, size, 0.6, bottom=below, color=colour, alpha=alpha, linewidth=0)
            below += size
            modelled += sizes["modelled"].get(axis, 0) / MB
        sent.plot([i], [modelled], "x", color="black", markersize=5)
    labels = [f"{r['grid']['row']} x {r['grid']['col']}\n{r['gpus']} ranks" for r in rows]
    millions = next(r.asked.parameters for r in content.measured if r.asked.model == rows[0]["model"]) / 1e6
    for axes in panels:
        axes.set_xlabel(f"G_row x G_col (the same U-Net of {millions:.1f}M parameters)")
        axes.set_xticks(range(len(rows)), labels)
        axes.grid(visible=False, axis="x")
    times.set_ylim(0, 1.12 * max(max(r["repeats_s"]) for r in rows))
    sent.set_ylim(0, 1.4 * max(sum(b["counted"].get(a, 0) for a in shades) for b in by_point.values()) / MB)
    handles: list[Any] = [
        Patch(color="0.3", label="along row, counted"),
        Patch(color="0.3", alpha=shades["col"], label="along col, counted"),
        Line2D([], [], color="black", marker="x", linewidth=0, markersize=5, label="communication model"),
    ]
    sent.legend(handles=handles, fontsize=5.5, loc="upper left", ncols=3, columnspacing=0.8, handlelength=1.2)


def measured_here(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of this machine by ranks; of as many ranks, the scheme comes first."""
    rows = [r for r in summary["rows"] if here(r)]
    return sorted(rows, key=lambda r: (r["gpus"], r["grid"]["row"]))
