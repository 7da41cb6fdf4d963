"""How all figures look, and how they are written: the same bytes from the same content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from axonn.training.places import PROJECT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

OUT = PROJECT / "plots" / "out"
COLUMN_IN = 3.5
"""Width of a column of a paper."""
PAGE_IN = 7.2
"""Width of its text."""
KINDS = {"published": "-", "predicted": "--", "measured": ":"}
"""Kinds of points are told apart by the line, the filling (published ones are filled) and the legend, never by colour
alone."""


@contextmanager
def styled(name: str) -> Iterator[None]:
    """Everything drawn inside has the style of the suite. `name`, of the figure, makes the ids inside of an SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import seaborn as sns

    with mpl.rc_context():
        sns.set_theme(context="paper", style="whitegrid", font_scale=0.85, rc={"svg.hashsalt": name})
        yield


def colours(count: int) -> list[tuple[float, float, float]]:
    """So many colours that people who see colours differently can tell apart."""
    import seaborn as sns

    return [(r, g, b) for r, g, b in sns.color_palette("colorblind", count)]


def mark(axes: Axes, x: Sequence[float], y: Sequence[float], what: Literal["busy", "suspect"]) -> None:
    """Ring points that are not to be taken as they are; in an SVG the rings have the id `what`."""
    if len(x):
        axes.plot(x, y, gid=what, zorder=5, **_RINGS[what])  # type: ignore[arg-type]


def mark_handle(what: Literal["busy", "suspect"]) -> Line2D:
    """What a legend says of such rings."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=_RING_LABELS[what], **_RINGS[what])  # type: ignore[arg-type]


_RINGS: dict[str, dict[str, object]] = {
    name: {
        "color": "firebrick", "marker": marker, "markersize": size, "markerfacecolor": "none", "markeredgewidth": 0.9,
        "linewidth": 0,
    }
    for name, marker, size in (("busy", "o", 10), ("suspect", "s", 4.5))
}  # fmt: skip
_RING_LABELS = {"busy": "machine busy", "suspect": "suspect"}


def save(figure: Figure, name: str, folder: Path | None = None) -> list[Path]:
    """Write NAME.png and NAME.svg into `folder` (default `OUT`) and close the figure; returns the files."""
    import matplotlib.pyplot as plt

    folder = folder or OUT
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    figure.savefig(files[0], dpi=300)
    figure.savefig(files[1], metadata={"Date": None})
    plt.close(figure)
    return files
