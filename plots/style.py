"""The look of all figures, and writing them: the same content gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from axonn.training.places import PROJECT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

OUT = PROJECT / "plots" / "out"
COLUMN_IN = 3.5
"""Width of a column of a paper."""
PAGE_IN = 7.2
"""Width of the text of a page."""
LINES: dict[str, Literal["-", "--", ":"]] = {"published": "-", "predicted": "--", "measured": ":"}
"""Line of each kind of points. Kinds differ by line, filling (published ones are filled) and legend, never by colour
alone."""


@contextmanager
def styled(name: str) -> Iterator[None]:
    """Give everything drawn inside the style of the suite. The ids inside an SVG derive from `name`, the figure's."""
    import matplotlib as mpl

    mpl.use("Agg")
    import seaborn as sns

    with mpl.rc_context():
        sns.set_theme(context="paper", style="whitegrid", font_scale=0.85, rc={"svg.hashsalt": name})
        yield


def colours(count: int) -> list[tuple[float, float, float]]:
    """Return `count` colours that people with colour vision deficiency can tell apart."""
    import seaborn as sns

    return [(r, g, b) for r, g, b in sns.color_palette("colorblind", count)]


def mark(axes: Axes, x: Sequence[float], y: Sequence[float], caveat: Literal["busy", "suspect"]) -> None:
    """Ring points that have a caveat, which is the id of the rings in an SVG."""
    if len(x):
        axes.plot(x, y, gid=caveat, zorder=5, **_RINGS[caveat])


def mark_handle(caveat: Literal["busy", "suspect"]) -> Line2D:
    """Return the legend's entry of the rings that `mark` draws."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=_RING_LABELS[caveat], **_RINGS[caveat])


_RINGS: dict[str, dict[str, Any]] = {
    name: {
        "color": "firebrick", "marker": marker, "markersize": size, "markerfacecolor": "none", "markeredgewidth": 0.9,
        "linewidth": 0,
    }
    for name, marker, size in (("busy", "o", 10), ("suspect", "s", 4.5))
}  # fmt: skip
_RING_LABELS = {"busy": "machine busy", "suspect": "suspect"}


def save(figure: Figure, name: str, folder: Path | None = None) -> list[Path]:
    """Write NAME.png and NAME.svg into `folder` (default `OUT`), close the figure and return the files."""
    import matplotlib.pyplot as plt

    folder = folder or OUT
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    figure.savefig(files[0], dpi=300)
    figure.savefig(files[1], metadata={"Date": None})
    plt.close(figure)
    return files
