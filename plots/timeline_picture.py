"""Spans as a picture: when each rank computes and communicates, and which collectives are hidden under compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from axonn.observability.perfetto_events import disjoint_lanes
from axonn.spans import COMPUTE, Span, SpanKind
from plots.style import PAGE_IN, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_RANKS = 4
"""Number of ranks that are drawn by default."""
LEAST_SEEN = 1e-3
"""Share of a picture's width below which a row is left out."""
ROW_IN = 0.17
"""Height of a row, inches."""
_BACKWARD = {
    SpanKind.BACKWARD: "////",
    SpanKind.BACKWARD_INPUT: "////",
    SpanKind.BACKWARD_WEIGHT: "\\\\\\\\",
}
_NAMES = {
    SpanKind.FORWARD: "forward",
    SpanKind.BACKWARD: "backward",
    SpanKind.BACKWARD_INPUT: "backward of inputs",
    SpanKind.BACKWARD_WEIGHT: "backward of weights",
    SpanKind.TENSOR: "collective along row or col",
    SpanKind.ALL_REDUCE: "gradient all-reduce",
    SpanKind.OPTIMIZER: "optimizer",
    SpanKind.COPY: "copy",
    SpanKind.SEND: "message",
    SpanKind.RECEIVE_WAIT: "waiting for a message",
    SpanKind.MESSAGES: "work with messages",
    SpanKind.IDLE: "waiting otherwise",
}
HIDDEN = ("hidden under compute", "exposed")
"""The two fates of a collective."""
Interval = tuple[float, float]


class Style(NamedTuple):
    """The look of a bar, and its name in the legend."""

    name: str
    colour: tuple[float, float, float]
    hatch: str = ""


class Bar(NamedTuple):
    """A span as it is drawn. Seconds."""

    start: float
    end: float
    style: Style
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class View:
    """The part of some spans that is drawn: a window of time (seconds on their clock), and the ranks.

    `zero`: the time at which the time axis is 0, by default the beginning of the window. `layers`: the labels of bars
    by layer, for predicted spans, which know it; other bars are labelled with their microbatch.
    """

    begin: float
    end: float
    ranks: tuple[int, ...]
    zero: float | None = None
    layers: Mapping[int, str] = field(default_factory=dict)

    def of(self, spans: Iterable[Span], rank: int) -> list[Span]:
        """Return a rank's spans that overlap the window."""
        return [s for s in spans if s.rank == rank and s.start < self.end and s.end > self.begin]

    def rows(self, spans: Iterable[Span], rank: int) -> dict[str, list[Bar]]:
        """Return `rows_of_rank` of a rank's spans, without bars outside the window and rows too empty to be seen."""
        rows = rows_of_rank(self.of(spans, rank), layers=self.layers)
        inside = {name: [b for b in bars if b.start < self.end and b.end > self.begin] for name, bars in rows.items()}
        least = LEAST_SEEN * (self.end - self.begin)
        return {name: bars for name, bars in inside.items() if sum(b.end - b.start for b in bars) > least}


@dataclass
class Legend:
    """The legend of the styles that were drawn, which it collects in order."""

    styles: dict[Style, None] = field(default_factory=dict)

    def draw(self, figure: Figure, *, columns: int = 4) -> None:
        """Draw the legend below everything."""
        from matplotlib.patches import Patch

        # Compute first, sub-shard by sub-shard; then what may be hidden; then the rest.
        order = [*_NAMES.values(), *HIDDEN]
        styles = sorted(self.styles, key=lambda s: (order.index(s.name.partition(", sub-shard")[0]), s.name))
        handles = [
            Patch(facecolor=s.colour, edgecolor="white", hatch=s.hatch, linewidth=0, label=s.name) for s in styles
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=6.5, frameon=False)


def full_view(spans: Sequence[Span], *, ranks: Sequence[int] | None = None) -> View:
    """Return the view of all of the spans' time, on these ranks or the first few."""
    all_ranks = sorted({s.rank for s in spans})
    return View(
        begin=min(s.start for s in spans),
        end=max(s.end for s in spans),
        ranks=tuple(all_ranks[:MOST_RANKS] if ranks is None else ranks),
    )


def hidden_and_exposed(spans: Iterable[Span]) -> tuple[list[Interval], list[Interval]]:
    """Return the times at which a collective of the tensor axes was under way on one rank while it computed, and those
    at which it did not compute.

    Over a whole run their lengths are `hidden`, and `collective` less `hidden`, of `axonn.spans.overlap`.
    """
    # Time, change of the number of collectives under way, change of the number of tasks computed.
    changes: list[tuple[float, int, int]] = []
    for s in spans:
        if s.kind == SpanKind.TENSOR:
            changes += [(s.start, 1, 0), (s.end, -1, 0)]
        elif s.kind in COMPUTE:
            changes += [(s.start, 0, 1), (s.end, 0, -1)]
    intervals: dict[bool, list[Interval]] = {True: [], False: []}
    collectives = tasks = 0
    before = 0.0
    for at, collective, task in sorted(changes):
        if collectives and at > before:
            current = intervals[tasks > 0]
            if current and current[-1][1] == before:
                current[-1] = (current[-1][0], at)
            else:
                current.append((before, at))
        before = at
        collectives += collective
        tasks += task
    return intervals[True], intervals[False]


def rows_of_rank(spans: Sequence[Span], *, layers: Mapping[int, str]) -> dict[str, list[Bar]]:
    """Return the rows of one rank by name, without empty ones.

    From top to bottom: compute, collectives of each sub-shard, whether these are hidden, messages, and waiting.
    """
    palette = colours(10)
    shard_colours = [palette[i] for i in (0, 1, 4, 2)]
    rows: dict[str, list[Bar]] = {"compute": []}
    shards = sorted({s.shard for s in spans if s.kind == SpanKind.TENSOR})
    several = len({s.microbatch for s in spans if s.kind in COMPUTE}) > 1
    for shard in shards:
        rows["collectives" if shard < 0 else f"collectives of sub-shard {shard}"] = []
    rows |= {"are they hidden?": [], "messages sent": [], "waiting": []}
    for s in sorted(spans, key=lambda s: (s.start, s.end)):
        colour = shard_colours[max(s.shard, 0) % len(shard_colours)]
        name = _NAMES[s.kind]
        shard_name = f"{name}, sub-shard {s.shard}" if s.shard >= 0 else name
        label = layers.get(s.layer, "")
        if s.kind in COMPUTE:
            label = label or (str(s.microbatch) if several and not layers else "")
            rows["compute"].append(Bar(s.start, s.end, Style(shard_name, colour, _BACKWARD.get(s.kind, "")), label))
        elif s.kind == SpanKind.TENSOR:
            row = "collectives" if s.shard < 0 else f"collectives of sub-shard {s.shard}"
            red, green, blue = (0.45 + 0.55 * part for part in colour)
            rows[row].append(Bar(s.start, s.end, Style(shard_name, (red, green, blue)), label))
        elif s.kind in (SpanKind.OPTIMIZER, SpanKind.COPY):
            rows["compute"].append(Bar(s.start, s.end, Style(name, palette[4 if s.kind == SpanKind.COPY else 2])))
        elif s.kind == SpanKind.ALL_REDUCE:
            rows.setdefault("gradient all-reduce", []).append(Bar(s.start, s.end, Style(name, palette[8], "....")))
        elif s.kind == SpanKind.SEND:
            rows["messages sent"].append(Bar(s.start, s.end, Style(name, palette[9])))
        else:
            shade = {SpanKind.RECEIVE_WAIT: 0.65, SpanKind.MESSAGES: 0.4}.get(s.kind, 0.85)
            rows["waiting"].append(Bar(s.start, s.end, Style(name, (shade, shade, shade))))
    hidden, exposed = hidden_and_exposed(spans)
    rows["are they hidden?"] = [Bar(*i, Style(HIDDEN[0], (0.35, 0.35, 0.35))) for i in hidden]
    rows["are they hidden?"] += [Bar(*i, Style(HIDDEN[1], palette[3], "xxxx")) for i in exposed]
    return {name: bars for name, bars in rows.items() if bars}


def draw_rank(axes: Axes, spans: Iterable[Span], view: View, rank: int, legend: Legend) -> int:
    """Draw one rank's rows within the view, in milliseconds, and return their number."""
    import matplotlib.pyplot as plt

    zero = view.begin if view.zero is None else view.zero
    rows = view.rows(spans, rank)
    for row, bars in enumerate(rows.values()):
        placed = disjoint_lanes(bars, lambda bar: (bar.start, bar.end))
        lanes = 1 + max(lane for lane, _ in placed)
        height = 0.8 / lanes
        by_style: dict[tuple[Style, int], list[Bar]] = {}
        for lane, bar in placed:
            legend.styles[bar.style] = None
            by_style.setdefault((bar.style, lane), []).append(bar)
        for (style, lane), styled_bars in by_style.items():
            pieces = [(max(b.start, view.begin), min(b.end, view.end)) for b in styled_bars]
            with plt.rc_context({"hatch.linewidth": 0.35}):
                axes.broken_barh(
                    [(1e3 * (start - zero), 1e3 * (end - start)) for start, end in pieces],
                    (row - 0.4 + lane * height, height),
                    facecolors=style.colour,
                    edgecolor="white",
                    linewidth=0.0 if style.name in HIDDEN else 0.25,
                    hatch=style.hatch,
                )
        _label(axes, [bar for _, bar in placed] if lanes == 1 else [], row, view, zero)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=6)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(1e3 * (view.begin - zero), 1e3 * (view.end - zero))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="x", labelsize=6.5, pad=1)
    axes.tick_params(axis="y", pad=1)
    return len(rows)


def _label(axes: Axes, bars: Iterable[Bar], row: int, view: View, zero: float) -> None:
    """Write their labels into the bars that are wide enough."""
    per_point = (view.end - view.begin) / (0.8 * axes.figure.get_figwidth() * 72)  # type: ignore[union-attr]
    for bar in bars:
        start, end = max(bar.start, view.begin), min(bar.end, view.end)
        if bar.label and end - start > 3.6 * len(bar.label) * per_point + 2 * per_point:
            dark = sum(bar.style.colour) < 1.9
            text = axes.text(
                1e3 * ((start + end) / 2 - zero), row, bar.label, fontsize=5, ha="center", va="center",
                color="white" if dark else "black",
                bbox={"boxstyle": "square,pad=0.08", "facecolor": bar.style.colour, "linewidth": 0},
            )  # fmt: skip
            # It lies inside its bar: the layout need not measure it.
            text.set_in_layout(False)


def draw_timeline(spans: Sequence[Span], view: View, *, title: str, names: dict[int, str], foot: str) -> Figure:
    """Draw the ranks of a view one below another. `names`: of ranks; `foot`: a note on what is and is not shown."""
    import matplotlib.pyplot as plt

    legend = Legend()
    rows = [max(1, len(view.rows(spans, rank))) for rank in view.ranks]
    figure, grid = plt.subplots(
        len(view.ranks),
        1,
        figsize=(PAGE_IN, 1.25 + sum(0.33 + ROW_IN * n for n in rows)),
        height_ratios=rows,
        squeeze=False,
        sharex=True,
        constrained_layout=True,
    )
    for axes, rank in zip(grid[:, 0], view.ranks, strict=True):
        draw_rank(axes, spans, view, rank, legend)
        axes.set_title(names.get(rank, f"rank {rank}"), fontsize=7, loc="left", pad=2)
    grid[-1, 0].set_xlabel(f"milliseconds\n{foot}", fontsize=6.5)
    figure.suptitle(title, fontsize=9)
    legend.draw(figure)
    return figure
