"""Bars of the last comparison with other frameworks. python -m plots.figures.baselines [results/baselines/summary.json]

Reads the summary, writes plots/out/baselines.png and .svg (baselines-quick and -link for the folders of these names).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axonn.cli.doc_links import explained
from axonn.durable_files import read_json
from axonn.errors import RecordError
from axonn.training.places import PROJECT, from_here
from plots.style import OUT, PAGE_IN, colours, mark, mark_handle, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Groups = list[tuple[str, list[dict[str, Any]]]]
"""Names and rows of the groups of a panel's bars."""
COMMAND = "make compare-baselines"
SUMMARY = PROJECT / "results" / "baselines" / "summary.json"
_OTHERS = (0.72, 0.72, 0.72)
_NOT_COMPARABLE = (0.93, 0.93, 0.93)
_BAR_INCHES = 0.24
_HEADINGS = 0.9
"""Height of the name of a group of bars, in heights of a bar."""


def load(path: Path) -> dict[str, Any]:
    """Return the summary of a comparison. Raises `RecordError` when there is none, or nothing in it to draw."""
    try:
        summary = read_json(path)
        rows = summary["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path}: is not the summary of a comparison ({error}); run: {COMMAND}") from error
    if not rows:
        raise RecordError(f"{path}: nothing was measured; run: {COMMAND}")
    return dict(summary)


def panels_of(rows: Sequence[dict[str, Any]]) -> list[tuple[str, Groups]]:
    """Return (title, groups) of each panel, which is a workload, on the loopback or over the link.

    Groups are kinds and conditions; in each, ours come first, then the others, the fastest first.
    """
    places: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        places.setdefault((row["workload"], row["link_kbit_per_s"] is not None), []).append(row)
    panels = []
    for (workload, over_link), panel_rows in places.items():
        groups = []
        for (kind, condition), group_rows in groupby(panel_rows, key=lambda r: (r["parallelism"], r["condition"])):
            name = f"{kind}: {condition.removeprefix('link: ')}" if over_link else kind
            groups.append((name, sorted(group_rows, key=lambda r: (not r["ours"], r["batch_time_s"]))))
        panels.append((f"{workload}, {'emulated link' if over_link else 'loopback'}", groups))
    return panels


def draw(summary: dict[str, Any], out: Path, name: str = "baselines") -> list[Path]:
    """Write the picture NAME: a panel for each workload, horizontal bars with quartiles and ratios."""
    with styled(name):
        return save(_drawn(summary), name, out)


def _drawn(summary: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    panels = panels_of(summary["rows"])
    heights = [sum(len(rows) + _HEADINGS for _, rows in groups) for _, groups in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(PAGE_IN, _BAR_INCHES * sum(heights) + 0.75 * len(panels) + 0.9),
        height_ratios=heights,
        squeeze=False,
        constrained_layout=True,
    )
    for axis, (title, groups) in zip(axes[:, 0], panels, strict=True):
        _draw_panel(axis, title, groups)
    shown = [row for _, groups in panels for _, rows in groups for row in rows]
    handles = _handles(shown)
    figure.legend(handles=handles, fontsize=7, ncols=len(handles), loc="outside lower center", frameon=False)
    machine = summary["provenance"]["machine"]
    ranks = ", ".join(str(n) for n in sorted({row["ranks"] for row in shown}))
    quick = "; a quick try, its times mean nothing" if summary["quick"] else ""
    figure.suptitle(
        f"Measured on {machine.get('cores')} cores ({machine.get('cpu')}), {ranks} ranks{quick}", fontsize=8
    )
    return figure


def _draw_panel(axis: Axes, title: str, groups: Groups) -> None:
    """Draw the bars of one workload, group below group."""
    import seaborn as sns

    longest = max(row["batch_time_quartiles_s"][1] for _, rows in groups for row in rows)
    at, names = 0.0, []
    for heading, rows in groups:
        axis.text(0.0, at - 0.05, heading, fontsize=7, style="italic", color="0.35", va="center")
        at += _HEADINGS
        for row in rows:
            _draw_bar(axis, row, at, gap=0.015 * longest)
            names.append((at, f"{row['framework']} {row['strategy']}{' *' if row['disclosure'] else ''}"))
            at += 1
    axis.set_yticks([y for y, _ in names], [text for _, text in names], fontsize=7)
    for label, (_, text) in zip(axis.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if text.startswith("AxoNN ") and "reference" not in text else "normal")
    axis.set_ylim(at - 0.4, -0.6)
    axis.set_xlim(0, 1.25 * longest)
    axis.set_title(title, fontsize=8.5, loc="left", fontweight="bold")
    axis.set_xlabel("seconds per batch (median, quartiles)", fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.yaxis.grid(visible=False)
    axis.xaxis.grid(visible=True, color="0.9")
    axis.set_axisbelow(True)
    sns.despine(ax=axis, left=True)


def _draw_bar(axis: Axes, row: dict[str, Any], at: float, *, gap: float) -> None:
    """Draw the bar of a row at this height, its quartiles, and its note, a `gap` of seconds to the right of them."""
    low, high = row["batch_time_quartiles_s"]
    time = row["batch_time_s"]
    agrees = row["failure"] is None
    quiet = not row.get("busy") or row.get("in_ratios", True)
    (ours,) = colours(1)
    axis.barh(
        at,
        time,
        height=0.76,
        color=(ours if row["ours"] else _OTHERS) if agrees and quiet else _NOT_COMPARABLE,
        hatch="////" if row["disclosure"] else None,
        edgecolor="white" if agrees else "0.6",
        linewidth=0.5,
        linestyle="-" if agrees else ":",
    )
    axis.errorbar(time, at, xerr=[[time - low], [high - time]], color="0.2", linewidth=0.9, capsize=2, capthick=0.9)
    if row.get("busy"):
        mark(axis, [time], [at], "busy")
    axis.text(max(time, high) + gap, at, _note(row), fontsize=7, va="center", bbox={"color": "white", "pad": 0.5})


def _handles(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the legend's entries for the looks that these rows have."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colours(1)[0], label="AxoNN"), Patch(color=_OTHERS, label="other frameworks")]
    if any(row["disclosure"] for row in rows):
        handles.append(Patch(facecolor=_OTHERS, hatch="////", edgecolor="white", label="* see the note in the table"))
    if any(row["failure"] is not None for row in rows):
        handles.append(Patch(facecolor=_NOT_COMPARABLE, edgecolor="0.6", linestyle=":", label="not comparable"))
    if any(row.get("busy") for row in rows):
        handles.append(mark_handle("busy"))
    handles.append(Line2D([], [], linewidth=0, label="number: ratio to the fastest AxoNN of the kind (95% interval)"))
    return handles


def _note(row: dict[str, Any]) -> str:
    """Return the text at the end of a bar."""
    if row["failure"] is not None:
        return "not comparable" if row["failure"]["cause"] == "not-comparable" else "failed"
    if row["ratio"] is None:
        return "machine busy" if row.get("busy") else ""
    low, high = row["spread"]
    return f"{row['ratio']:.2f}" + ("" if low == high else f" ({low:.2f} to {high:.2f})")


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m plots.figures.baselines", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("summary", nargs="?", type=Path, default=SUMMARY, help="default that of the last whole run")
    source: Path = parser.parse_args(arguments).summary
    summary = load(source)
    folder = source.resolve().parent.name
    name = SUMMARY.parent.name if folder == SUMMARY.parent.name else f"baselines-{folder}"
    try:
        paths = draw(summary, OUT, name)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise RecordError(f"{source}: cannot be drawn ({type(error).__name__}: {error}); run: {COMMAND}") from error
    print(f"picture: {', '.join(map(from_here, paths))}")


if __name__ == "__main__":
    with explained("docs/compare.md"):
        main(sys.argv[1:])
