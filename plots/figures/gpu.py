"""The measurements of make bench-gpu as one picture. python -m plots.figures.gpu [results/gpu/summary.json]

Reads the summary, writes plots/out/gpu.png and .svg (gpu-FOLDER for another folder, so that the miniature of a CPU
never takes the place of a GPU's measurements).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axonn.cli.doc_links import explained
from axonn.durable_files import read_json
from axonn.errors import RecordError
from axonn.training.places import PROJECT, from_here
from plots.style import OUT, PAGE_IN, colours, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = PROJECT / "results" / "gpu"
SUMMARY = RESULTS / "summary.json"
COMMAND = "make bench-gpu"
ON_DEVICE = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "buckets": "buckets",
}
"""Categories of model state on the device, and their names in legends."""
_BAR_INCHES = 0.24
_OTHERS = (0.72, 0.72, 0.72)
Rows = Sequence[Mapping[str, Any]]


def load(path: Path) -> dict[str, Any]:
    """Return the summary of a run. Raises `RecordError` when there is none, or nothing in it."""
    try:
        summary = read_json(path)
        rows = [row for row in summary["rows"] if isinstance(row, dict)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path}: is not the summary of a run on a GPU ({error}); run: {COMMAND}") from error
    if not rows:
        raise RecordError(f"{path}: nothing was measured; run: {COMMAND}")
    return dict(summary) | {"rows": rows}


def picture_name(path: Path) -> str:
    """Return the name of the picture of a summary."""
    folder = path.resolve().parent
    if folder == RESULTS:
        return "gpu"
    inside = folder.relative_to(RESULTS).parts if folder.is_relative_to(RESULTS) else (folder.name,)
    return "-".join(("gpu", *inside))


def of_part(summary: Mapping[str, Any], part: str, key: str) -> list[dict[str, Any]]:
    """Return the rows of a part that have a number under `key` and did not fail."""
    return [r for r in summary["rows"] if r.get("part") == part and r.get(key) is not None and not r.get("failure")]


def draw(summary: Mapping[str, Any], out: Path, name: str) -> list[Path]:
    """Write the picture, with a panel for each part that has measured something."""
    with styled(name):
        return save(_drawn(summary), name, out)


def _drawn(summary: Mapping[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    speeds = of_part(summary, "gpt", "tflops") + of_part(summary, "unet", "tflops")
    memory = [r for r in of_part(summary, "offload", "memory") if r.get("memory", {}).get("parameters")]
    shares = of_part(summary, "overlap", "share")
    panels: list[tuple[Rows, Callable[[Axes, Rows], None]]] = [
        (rows, drawer) for rows, drawer in ((speeds, _speeds), (memory, _memory), (shares, _shares)) if rows
    ]
    if not panels:
        raise RecordError(f"nothing of what was measured can be drawn: every part failed; run: {COMMAND}")
    heights = [len(rows) + 2.2 for rows, _ in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(PAGE_IN, _BAR_INCHES * sum(heights) + 0.5 * len(panels) + 0.4),
        height_ratios=heights,
        squeeze=False,
        constrained_layout=True,
    )
    for axis, (rows, drawer) in zip(axes[:, 0], panels, strict=True):
        drawer(axis, rows)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
    figure.suptitle(headline(summary), fontsize=8)
    return figure


def headline(summary: Mapping[str, Any]) -> str:
    """Return the title: the device of the measurements, and whether they mean anything."""
    machine = (summary.get("provenance") or {}).get("machine") or {}
    device = machine.get("cpu") if summary.get("device") == "cpu" else summary.get("device")
    mini = "; in miniature, so that the numbers mean nothing" if summary.get("quick") else ""
    return f"Measured on {device}, torch {machine.get('torch')}{mini}"


def _speeds(axis: Axes, rows: Rows) -> None:
    (ours,) = colours(1)
    names = [f"{r['model']}: {r['contender']}" for r in rows]
    for at, row in enumerate(rows):
        axis.barh(at, row["tflops"], height=0.76, color=ours if row.get("ours") else _OTHERS)
        note = f"{row['units_per_s']:,.0f} {row['unit']}/s"
        if row.get("pct_peak") is not None:
            note += f", {row['pct_peak']:.1f}% of peak"
        if row.get("ratio") is not None:
            note += f", AxoNN / this {row['ratio']:.3f}"
        axis.annotate(note, (row["tflops"], at), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5)
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.set_xlim(0, 2.1 * max(row["tflops"] for row in rows))
    axis.set_xlabel("TFLOP/s without recompute, bfloat16 (measured)")


def _memory(axis: Axes, rows: Rows) -> None:
    palette = colours(len(ON_DEVICE))
    most = 0.0
    for at, row in enumerate(rows):
        left = 0.0
        for (key, label), colour in zip(ON_DEVICE.items(), palette, strict=True):
            size = row["memory"].get(key, 0) / 1e9
            axis.barh(at, size, left=left, height=0.76, color=colour, label=label if at == 0 else None)
            left += size
        most = max(most, left)
        if row.get("model_bytes"):
            by_model = row["model_bytes"] / 1e9
            axis.plot([by_model] * 2, [at - 0.45, at + 0.45], "k--", linewidth=1, label=None if at else "memory model")
    axis.set_yticks(range(len(rows)), [f"{r['model']}: {r['contender']}" for r in rows], fontsize=7)
    axis.set_xlim(0, 1.15 * most)
    axis.set_xlabel("model state on the device, GB (measured; dashed: predicted by the memory model)")
    axis.legend(fontsize=6.5, ncols=len(ON_DEVICE) + 1, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _shares(axis: Axes, rows: Rows) -> None:
    (ours,) = colours(1)
    for at, row in enumerate(rows):
        axis.barh(at, 100 * row["share"], height=0.76, color=ours)
        axis.annotate(
            f"{100 * row['share']:.0f}%", (100 * row["share"], at), xytext=(3, 0), textcoords="offset points",
            va="center", fontsize=6.5,
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), [r["contender"] for r in rows], fontsize=7)
    axis.set_xlim(0, 115)
    axis.set_xlabel("share that is hidden, % (measured)")


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m plots.figures.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("summary", nargs="?", type=Path, default=SUMMARY, help="default that of the last whole run")
    source: Path = parser.parse_args(arguments).summary
    summary = load(source)
    name = picture_name(source)
    try:
        paths = draw(summary, OUT, name)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise RecordError(f"{source}: cannot be drawn ({type(error).__name__}: {error}); run: {COMMAND}") from error
    print(f"picture: {', '.join(map(from_here, paths))}")


if __name__ == "__main__":
    with explained("docs/compare.md"):
        main(sys.argv[1:])
