"""Memory on the device with and without the memory optimisation. python -m plots.figures.memory [--fresh]"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from axonn.perf.timing.memory_model import model_state_bytes
from plots.figure import FigureKind, main
from plots.figure_records import Content
from plots.published_tables import read_reading
from plots.style import COLUMN_IN, LINES, colours
from plots.summary import here, small_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {"model_state": "state", "checkpoints": "checkpoints", "working": "recomputed"}
ON_DEVICE = {"parameters": "parameters", "gradients": "gradients", "optimizer_state": "optimizer", "buckets": "buckets"}
"""Entries of `Engine.memory` that are model state on the device, and their names in legends."""
ALL = "all GPUs together"
"""Label of readings of all GPUs; others are of the model state of one."""
BSIZES = [1_000_000 * 2**i for i in range(10)]
HATCHES = {"predicted": "////", "measured": "...."}


def extras(content: Content, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return published memory beside predicted, the formula over bsize, and what the engine allocates. Bytes,
    percent."""
    predicted = {r["point"]: r for r in rows if r["kind"] == "predicted"}
    compared = []
    for reading in read_reading(content.experiment, "memory_gb"):
        point = f"G_inter {reading['G_inter']}, {reading['optimizer']}"
        row, published = predicted.get(point), 1e9 * float(reading["gb"])
        parts = None if row is None else row["memory_of_all"]
        if row is not None and parts is not None and reading["what"] != ALL:
            # The mean over the stages' GPUs, as the publication counts phi.
            parts = {"model_state": parts["model_state"] // row["gpus"]}
        total = None if parts is None else sum(parts.values())
        compared.append(
            {
                "point": point,
                "what": reading["what"],
                "published_bytes": published,
                "predicted_bytes": total,
                "predicted_parts": parts,
                "error_pct": None if total is None else 100 * (total / published - 1),
            }
        )
    parameters = {r.asked.model: r.asked.parameters for r in content.records}
    grids = {r["grid"]["inter"]: parameters[r["model"]] // r["grid"]["inter"] for r in predicted.values()}
    return {
        "memory": compared,
        "over_bsize": [
            {
                "G_inter": inter,
                "parameters": phi,
                "without_bytes": model_state_bytes(phi, optimizer="device"),
                "bsize": BSIZES,
                "with_bytes": [model_state_bytes(phi, optimizer="offloaded", bsize=b) for b in BSIZES],
            }
            for inter, phi in sorted(grids.items())
        ],
        "allocated": [_allocated(row, parameters[row["model"]]) for row in rows if here(row)],
    }


def _allocated(row: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Return the model state of a run, per parameter."""
    parts = row["memory_of_all"] or {}
    per_parameter = {part: parts.get(part, 0) / parameters for part in ON_DEVICE}
    return {
        "point": row["point"],
        "model": row["model"],
        "parameters": parameters,
        "bytes_per_parameter": per_parameter,
        "on_device_per_parameter": sum(per_parameter.values()),
        "on_host_per_parameter": parts.get("host", 0) / parameters,
    }


def draw(summary: dict[str, Any], content: Content) -> Figure:
    """Draw the formula over bsize, the memory of all GPUs, and bytes per parameter here."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplot_mosaic(
        [["formula", "all"], ["here", "here"]],
        figsize=(COLUMN_IN, 3.9),
        constrained_layout=True,
        height_ratios=[1.6, 1],
    )
    _over_bsize(panels["formula"], summary)
    _all_gpus(panels["all"], summary)
    _here(panels["here"], summary)
    figure.suptitle(f"{summary['title']}", fontsize=8.5)
    return figure


def _over_bsize(axes: Axes, summary: dict[str, Any]) -> None:
    for colour, line in zip(colours(len(summary["over_bsize"])), summary["over_bsize"], strict=True):
        sizes = [b / 1e6 for b in line["bsize"]]
        inter = rf"$G_{{inter}}$ {line['G_inter']}"
        axes.plot(
            sizes, [b / 1e9 for b in line["with_bytes"]], LINES["predicted"], color=colour, linewidth=1.1,
            label=f"{inter}, with",
        )  # fmt: skip
        axes.plot(
            [sizes[0], sizes[-1]], [line["without_bytes"] / 1e9] * 2, LINES["predicted"], color=colour, linewidth=2.2,
            label=f"{inter}, without",
        )  # fmt: skip
    for x in summary["memory"]:
        if x["what"] != ALL:
            axes.plot(
                [BSIZES[0] / 1e6 * 1.6], [x["published_bytes"] / 1e9], "s", color="0.25", markersize=4,
                label="published, without",
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
    axes.minorticks_off()
    axes.set_ylim(0, 68)
    axes.tick_params(labelsize=6.5)
    axes.set_xlabel("bsize, million elements", fontsize=6.5)
    axes.set_ylabel("GB of model state per GPU", fontsize=6.5)
    axes.set_title("GPT 12B, formula (predicted)", fontsize=7)
    axes.legend(fontsize=5.2, loc="upper left", handlelength=2.2, ncols=1, labelspacing=0.25, borderpad=0.3)


def _all_gpus(axes: Axes, summary: dict[str, Any]) -> None:
    shades = dict(zip(PARTS, colours(len(PARTS)), strict=True))
    readings = [x for x in summary["memory"] if x["what"] == ALL]
    for i, x in enumerate(readings):
        axes.bar(i - 0.2, x["published_bytes"] / 1e9, 0.36, color="0.55", label="published" if not i else None)
        axes.text(i - 0.2, x["published_bytes"] / 1e9 + 8, f"{x['published_bytes'] / 1e9:.0f}", ha="center", fontsize=6)
        bottom = 0.0
        for part, size in (x["predicted_parts"] or {}).items():
            axes.bar(
                i + 0.2, size / 1e9, 0.36, bottom=bottom, color=shades[part], hatch=HATCHES["predicted"],
                edgecolor="white", linewidth=0, label=None if i else f"predicted: {PARTS[part]}",
            )  # fmt: skip
            bottom += size / 1e9
        if bottom:
            axes.text(i + 0.2, bottom + 8, f"{bottom:.0f}", ha="center", fontsize=6)
    axes.set_xticks(range(len(readings)), ["without", "with"][: len(readings)])
    axes.set_ylim(0, 900)
    axes.grid(visible=False, axis="x")
    axes.tick_params(labelsize=6.5)
    axes.set_ylabel("GB on 48 GPUs", fontsize=6.5)
    axes.set_title(r"$G_{inter}$ 24, bsize 16 million", fontsize=7)
    axes.legend(fontsize=5.2, loc="upper right", labelspacing=0.25, borderpad=0.3)


def _here(axes: Axes, summary: dict[str, Any]) -> None:
    runs = summary["allocated"]
    shades = dict(zip(ON_DEVICE, colours(len(ON_DEVICE)), strict=True))
    for i, run in enumerate(runs):
        left = 0.0
        for part, size in run["bytes_per_parameter"].items():
            axes.barh(
                i, size, 0.6, left=left, color=shades[part], hatch=HATCHES["measured"], edgecolor="white", linewidth=0,
                label=None if i else f"measured: {ON_DEVICE[part]}",
            )  # fmt: skip
            left += size
        axes.text(left + 0.2, i, f"{left:.1f}", va="center", fontsize=6)
    if not runs:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, fontsize=7)
    axes.set_yticks(range(len(runs)), [run["point"].replace(", ", ",\n") for run in runs], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, 30)
    axes.grid(visible=False, axis="y")
    axes.tick_params(labelsize=6.5)
    axes.set_xlabel("bytes of model state on the device, per parameter", fontsize=6.5)
    axes.set_title("allocated by the engine here, bfloat16", fontsize=7)
    if runs:
        axes.legend(fontsize=5.2, loc="lower right", labelspacing=0.25, borderpad=0.3)


def tables(summary: dict[str, Any], content: Content) -> Iterator[RenderableType]:
    """Yield published beside predicted memory, and what is allocated here."""
    table = small_table(
        "Memory of GPT 12B in GB (predicted: state, checkpoints, recomputed)",
        "",
        "published",
        "predicted",
        "error",
        "of it",
    )
    for x in summary["memory"]:
        parts = x["predicted_parts"] or {}
        table.add_row(
            f"{x['point']}{'' if x['what'] == ALL else ', a GPU'}",
            f"{x['published_bytes'] / 1e9:.2f}",
            "-" if x["predicted_bytes"] is None else f"{x['predicted_bytes'] / 1e9:.2f}",
            "-" if x["error_pct"] is None else f"{x['error_pct']:+.1f}%",
            ", ".join(f"{size / 1e9:.1f}" for size in parts.values()) or "-",
        )
    yield table
    allocated = small_table(
        "Model state here (measured), bytes per parameter",
        "",
        "weights",
        "gradients",
        "optimizer",
        "buckets",
        "all",
        "host",
    )
    for run in summary["allocated"]:
        allocated.add_row(
            run["point"],
            *(f"{run['bytes_per_parameter'][part]:.2f}" for part in ON_DEVICE),
            f"{run['on_device_per_parameter']:.2f}",
            f"{run['on_host_per_parameter']:.2f}",
        )
    yield allocated


MEMORY = FigureKind(name="memory", draw=draw, tables=tables, extras=extras)

if __name__ == "__main__":
    main(MEMORY)
