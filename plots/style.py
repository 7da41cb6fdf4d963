"""How all figures look, and how they are written: the same bytes from the same content."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.places import PROJECT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
