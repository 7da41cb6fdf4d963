"""Stacked bars of the parts of a batch: parts differ by colour and hatching, kinds by filling and line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import TYPE_CHECKING, Any

from plots.style import LINES, colours, mark, mark_handle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WHOLE = "inter_layer"
NAMES = {
    WHOLE: "inter-layer phase, not split",
    "compute": "compute",
    "tensor": "tensor all-reduce",
    "point_to_point": "point-to-point",
    "bubble": "bubble",
    "all_reduce": "all-reduce of gradients",
    "optimizer": "optimizer",
    "unexplained": "unexplained",
    "undivided": "batch, not broken down",
}
"""Names of the parts, from the bottom of a bar up."""
INSIDE = ("compute", "tensor", "point_to_point", "bubble")
"""Parts of the inter-layer phase."""
_LOOKS = {
    WHOLE: (0, ""),
    "compute": (9, ""),
    "tensor": (4, "|||"),
    "point_to_point": (3, "---"),
    "bubble": (8, "..."),
    "all_reduce": (1, "////"),
    "optimizer": (2, "xxxx"),
    "unexplained": (7, "++++"),
    "undivided": (5, ""),
}
"""Number of the colour, and hatching, by part."""
_LEAST_SHARES = {"unexplained": 0.001}
_LEAST_SHARE = 0.0001
"""Parts of a smaller share of the bar are not drawn."""
_LEAST_HEIGHT = 0.045
"""Blocks of less than this share of the axis have their number beside the bar."""
_WIDTH = 0.5
_UNITS = {"s": (1.0, 2), "ms": (1000.0, 1)}
"""Factor from seconds, and decimals, by unit."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One bar. Bars of one `group` stand together. `parts` (see `NAMES`) and `total` are seconds."""

    group: str
    kind: str
    parts: dict[str, float]
    total: float
    note: str = ""
    """A last line of the group's label."""
    repeats: list[float] = field(default_factory=list)
    """Batch times of single runs, drawn as circles."""
    busy: bool = False
    """True if the machine was busy with other work while it was measured."""
    label: str = ""
    """Text below the bar in a group; default its kind."""

    @property
    def drawn(self) -> dict[str, float]:
        """Seconds of the parts that are large enough to be drawn."""
        return {n: s for n, s in self.parts.items() if s > self.total * _LEAST_SHARES.get(n, _LEAST_SHARE)}


def draw_stacks(axes: Axes, stacks: Sequence[Stack], *, unit: str, grouped: bool) -> None:
    """Draw bars side by side, each with its total above it and the size of its blocks in or beside them.

    `grouped`: below each bar is its kind, and below the bars of a group the group's label; otherwise the label is below
    each bar.
    """
    scale, decimals = _UNITS[unit]
    top = 1.2 * scale * max((max([s.total, *s.repeats]) for s in stacks), default=1.0)
    places: dict[str, list[float]] = {}
    x = 0.0
    # More than two bars in a group stand closer.
    crowded = grouped and len(stacks) > 2 * len({s.group for s in stacks})
    for i, stack in enumerate(stacks):
        if i:
            x += 1.0 if stack.group == stacks[i - 1].group else 1.15
        places.setdefault(stack.group, []).append(x)
        reached = _draw_stack(axes, x, stack, scale=scale, decimals=decimals, top=top)
        if stack.busy:
            mark(axes, [x], [scale * stack.total], "busy")
        axes.text(
            x, reached + 0.02 * top, f"{_number(scale * stack.total, decimals)} {unit}", ha="center",
            fontsize=5.5 if crowded else 7, fontweight="bold",
        )  # fmt: skip
    labels = {s.group: _wrapped(", ".join(filter(None, (s.group, s.note))), 48 // len(places)) for s in stacks}
    ticks = [(s.label or s.kind) if grouped else labels[s.group] for s in stacks]
    axes.set_xticks([x for group in places.values() for x in group], ticks, fontsize=5 if crowded else 6.5)
    for name, group in places.items() if grouped else ():
        axes.text(
            sum(group) / len(group), -0.15 if crowded else -0.13, labels[name], ha="center", va="top", fontsize=6.5,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set_xlim(-0.6, x + 0.75)
    axes.set_ylim(0, top)
    axes.grid(visible=False, axis="x")


def _wrapped(text: str, width: int) -> str:
    """Break a label into lines, and set the axes of its extents as subscripts."""
    lines = "\n".join(fill(part, width) for part in text.split(", "))
    for axis in ("inter", "data"):
        lines = lines.replace(f"G_{axis}", rf"$G_{{\mathrm{{{axis}}}}}$")
    return lines


def _number(value: float, decimals: int) -> str:
    text = f"{value:.{0 if value >= 100 else decimals}f}"
    return text if float(text) else f"{value:.1g}"


def _draw_stack(axes: Axes, x: float, stack: Stack, *, scale: float, decimals: int, top: float) -> float:
    """Draw one bar; return the height that it, or the last number beside it, reaches."""
    bottom = 0.0
    numbers_beside: list[tuple[float, str]] = []
    for name, seconds in stack.drawn.items():
        height = scale * seconds
        axes.bar(x, height, _WIDTH, bottom=bottom, **_look(name, stack.kind))
        middle = bottom + height / 2
        if height >= _LEAST_HEIGHT * top:
            axes.text(x, middle, _number(height, decimals), ha="center", va="center", fontsize=6, bbox=_PAPER)
        else:
            numbers_beside.append((middle, _number(height, decimals)))
        bottom += height
    reached = bottom
    right = x + _WIDTH / 2
    places = _spread([middle for middle, _ in numbers_beside], 0.042 * top)
    for (middle, text), at in zip(numbers_beside, places, strict=True):
        axes.annotate(
            text, (right, middle), (right + 0.08, at), fontsize=5.5, va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "0.3", "shrinkA": 0.5, "shrinkB": 0},
        )  # fmt: skip
        reached = max(reached, at + 0.02 * top)
    for time in stack.repeats:
        axes.plot(x - _WIDTH / 2 - 0.12, scale * time, **_RUN)
    return reached


_RUN: dict[str, Any] = {"color": "0.1", "marker": "o", "markerfacecolor": "white", "markersize": 3.5, "linewidth": 0}
_PAPER = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}


def _spread(ascending: Sequence[float], distance: float) -> list[float]:
    """Move places up, no more than is needed to keep them a distance apart."""
    places: list[float] = []
    for place in ascending:
        places.append(place if not places else max(place, places[-1] + distance))
    return places


def _look(name: str, kind: str) -> dict[str, Any]:
    """Return the look of a part: full colours in published bars, pale ones in others."""
    number, hatch = _LOOKS[name]
    colour = colours(10)[number]
    pale = (*(1 - 0.45 * (1 - c) for c in colour),)
    return {
        "facecolor": colour if kind == "published" else pale,
        "edgecolor": "0.25",
        "linewidth": 0.7,
        "linestyle": LINES[kind],
        "hatch": hatch,
    }


def legend(axes: Axes, stacks: Iterable[Stack]) -> None:
    """Draw the names of all parts that are drawn, and of the kinds."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    all_stacks = list(stacks)
    used = {name for stack in all_stacks for name in stack.drawn}
    kinds = [kind for kind in LINES if any(stack.kind == kind for stack in all_stacks)]
    handles: list[Patch | Line2D] = [
        Patch(
            label=f"inter-layer: {label}" if name in INSIDE else label,
            **_look(name, "published" if name == WHOLE else "predicted"),
        )
        for name, label in NAMES.items()
        if name in used
    ]
    handles += [
        Patch(facecolor="0.45" if kind == "published" else "0.85", edgecolor="0.25", linestyle=LINES[kind], label=kind)
        for kind in kinds
    ]
    if any(stack.repeats for stack in all_stacks):
        handles.append(Line2D([], [], label="single run", **_RUN))
    if any(stack.busy for stack in all_stacks):
        handles.append(mark_handle("busy"))
    axes.legend(handles=handles, fontsize=6.5, ncols=2, loc="center", handlelength=2.2, handleheight=1.1)
