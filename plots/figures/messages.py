"""Messages and all-reduces, published and of this machine. python -m plots.figures.messages [--fresh]"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import floor, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from axonn.perf.machine.machine_file import Curve, MachineFile, load_machine
from axonn.training.places import from_here
from experiments.calibration import measure_machine
from plots.figure import Content, FigureKind, main
from plots.published_tables import column, read_reading
from plots.style import COLUMN_IN, KIND_LINES, colours, mark, mark_handle
from plots.summary import small_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WHAT = {"messages": "point-to-point message", "all_reduce": "all-reduce"}
COLUMNS = {
    "mpi_intra_ms": ("MPI", "inside a node"),
    "mpi_inter_ms": ("MPI", "between two nodes"),
    "nccl_intra_ms": ("NCCL", "inside a node"),
    "nccl_inter_ms": ("NCCL", "between two nodes"),
}
BETWEEN = "between two nodes"
PLACES = {"inside a node": "1 node", "between two nodes": "2 nodes", "shared memory": "1 node", "loopback": "1 node"}
"""In the table."""
HERE = {"mpi": ("MPI", "shared memory"), "nccl": ("Gloo", "loopback")}
"""Of a local machine file, in which torch.distributed has NCCL's place."""
OUTLIER = 1.2
"""A point that is so many times slower than both of its neighbours stands out; times grow with the size."""
SUSPECT = 2.0
"""A message between nodes that is so many times faster than one inside a node is suspect."""


SUSPECT_MARK = " ?"
"""Behind a suspect number in a table."""
FIT = {"published": "", "measured": " (fit)"}
STEP = 4
"""From one size of a measured curve to the next."""


def local_file() -> Path:
    """Where `axonn calibrate` writes."""
    return measure_machine.LOCAL


LEAST_RANKS = 2
"""With fewer nothing is sent, and the machine file's times are those of copies."""


def lacks(content: Content) -> list[str]:
    """Whether this machine was calibrated, with ranks that have somebody to send to."""
    path = local_file()
    if path.exists():
        alone = load_machine(path).node.gpus.number < LEAST_RANKS
        return ["messages of this machine are not measured: it was calibrated with a single rank"] if alone else []
    return [f"messages of this machine are not measured ({from_here(path)} is not there); run: axonn calibrate --quick"]


def inputs(content: Content) -> list[Path]:
    """The machine file, where there is one."""
    return [path for path in [local_file()] if path.exists()]


def extras(content: Content, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Every curve by kind (bytes and milliseconds, and the sizes of its suspect points), and what is suspect among the
    published points, in words."""
    series, suspect = [], []
    for what, called in WHAT.items():
        table = read_reading(content.experiment, what)
        sizes = [int(size) for size in column(table, "bytes")]
        times = {name: column(table, name) for name in COLUMNS}
        for name, (library, where) in COLUMNS.items():
            found = _outliers(sizes, times[name])
            curve = _series("published", what, (library, where), zip(sizes, times[name], strict=True))
            series.append(curve | {"suspect_bytes": found})
            if found:
                suspect.append(f"{called}, {library} {where}: slower than both neighbours at {_list(found)} bytes")
        for library in ("mpi", "nccl"):
            inside, between = times[f"{library}_intra_ms"], times[f"{library}_inter_ms"]
            faster = [i for i in range(len(sizes)) if inside[i] > SUSPECT * between[i]]
            if faster:
                # Those between nodes: they cannot be faster (`SUSPECT`).
                of = (what, library.upper(), BETWEEN)
                (curve,) = (s for s in series if (s["what"], s["library"], s["where"]) == of)
                curve["suspect_bytes"] = sorted({*curve["suspect_bytes"], *(sizes[i] for i in faster)})
                most = max(inside[i] / between[i] for i in faster)
                suspect.append(
                    f"{called}, {library.upper()}: up to {sizes[faster[-1]]} bytes faster between two nodes than "
                    f"inside one, by up to a factor of {most:.1f}"
                )
    machine = load_machine(local_file()) if local_file().exists() else None
    return {"series": series + ([] if machine is None else _measured(machine)), "suspect": suspect}


def _measured(machine: MachineFile) -> list[dict[str, Any]]:
    """Curves of this machine's file; all-reduces are Gloo's."""
    if machine.node.gpus.number < LEAST_RANKS:
        return []
    network = machine.network
    found = []
    for library, (name, where) in HERE.items():
        curve = network.p2p[library].intra_node
        found.append(_fitted("messages", name, where, curve))
    found.append(_fitted("all_reduce", *HERE["nccl"], network.all_reduce.intra_node))
    found[-1]["ranks"] = network.all_reduce.intra_node_ranks.number
    return found


def _fitted(what: str, library: str, where: str, curve: Curve) -> dict[str, Any]:
    """A measured curve over the sizes that it was fitted on."""
    least, most = curve.segments[0].min_bytes, curve.segments[-1].max_bytes
    sizes = [int(least * STEP**i) for i in range(1 + floor(log(most / least, STEP) + 1e-9))]
    own = _series("measured", what, (library, where), ((size, 1e3 * curve.seconds(size)) for size in sizes))
    return own | {
        "suspect_bytes": [],
        "source": curve.fit.source,
        "fit_error_pct": getattr(curve.fit, "in_sample_error_pct", None),
    }


def _series(kind: str, what: str, of: tuple[str, str], points: Iterable[tuple[int, float]]) -> dict[str, Any]:
    """`of`: library, and where; `points`: bytes and milliseconds."""
    sizes, times = zip(*points, strict=True)
    return {"kind": kind, "what": what, "library": of[0], "where": of[1], "bytes": list(sizes), "ms": list(times)}


def _outliers(sizes: Sequence[int], times: Sequence[float]) -> list[int]:
    """Sizes whose time is above that of the next size and of the one before."""
    return [
        sizes[i]
        for i in range(1, len(sizes) - 1)
        if times[i] > OUTLIER * times[i - 1] and times[i] > OUTLIER * times[i + 1]
    ]


def _list(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def draw(summary: dict[str, Any], content: Content) -> Figure:
    """Messages, all-reduces: published above, measured below."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(COLUMN_IN, 3.9), constrained_layout=True, sharex=True, sharey=True)
    shades = dict(zip(("MPI", "NCCL", "Gloo"), colours(3), strict=True))
    markers = {"inside a node": "o", "between two nodes": "^", "shared memory": "s", "loopback": "D"}
    for row, (kind, where) in zip(panels, (("published", "Summit"), ("measured", "this machine")), strict=True):
        for axes, what in zip(row, WHAT, strict=True):
            mine = [s for s in summary["series"] if (s["kind"], s["what"]) == (kind, what)]
            for s in mine:
                axes.plot(
                    s["bytes"], s["ms"], KIND_LINES[kind], color=shades[s["library"]], marker=markers[s["where"]],
                    markersize=2.6, linewidth=0.9, label=f"{s['library']}, {s['where']}{FIT[kind]}",
                    # A fit has no points: one marker, for the legend.
                    markevery=1 if kind == "published" else [0],
                    markerfacecolor=shades[s["library"]] if kind == "published" else "white",
                )  # fmt: skip
                sizes = [size for size in s["bytes"] if size in s["suspect_bytes"]]
                mark(axes, sizes, [s["ms"][s["bytes"].index(size)] for size in sizes], "suspect")
            _label(axes, f"{what.replace('_', '-')}, {where}\n({kind})")
            if not mine:
                axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, fontsize=7)
    for axes in (panels[0][0], panels[1][0], panels[1][1]):
        handles = axes.get_legend_handles_labels()[0]
        if axes is panels[0][0] and any(s["suspect_bytes"] for s in summary["series"]):
            handles.append(mark_handle("suspect"))
        if handles:
            axes.legend(handles=handles, fontsize=5, loc="upper left", handlelength=2, borderpad=0.3, labelspacing=0.3)
    figure.suptitle(summary["title"], fontsize=8.5)
    for axes in panels[1]:
        axes.set_xlabel("bytes", fontsize=7)
    for axes in panels[:, 0]:
        axes.set_ylabel("milliseconds", fontsize=7)
    return figure


def _marked(series: dict[str, Any], place: int) -> str:
    """The mark of a suspect point of a curve, of the point in this place."""
    return SUSPECT_MARK if series["bytes"][place] in series["suspect_bytes"] else ""


def _label(axes: Axes, title: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 2e4)
    axes.set_xticks([1, 1e3, 1e6, 1e9], ["1", "1 K", "1 M", "1 G"])
    axes.minorticks_off()
    axes.set_title(title, fontsize=7)
    axes.tick_params(labelsize=6.5)


def tables(summary: dict[str, Any], content: Content) -> Iterator[RenderableType]:
    """Least time, and bandwidth at the largest size."""
    table = small_table("Messages and all-reduces", "", "bytes", "ms", "MB", "ms", "GB/s")
    for s in summary["series"]:
        table.add_row(
            f"{s['kind']} {s['what'].replace('_', '-')}, {s['library']}, {PLACES.get(s['where'], s['where'])}",
            str(s["bytes"][0]),
            f"{s['ms'][0]:.4f}{_marked(s, 0)}",
            f"{s['bytes'][-1] / 1e6:.0f}",
            f"{s['ms'][-1]:.1f}{_marked(s, -1)}",
            f"{s['bytes'][-1] / s['ms'][-1] / 1e6:.1f}{_marked(s, -1)}",
        )
    yield table
    if any(_marked(s, place) for s in summary["series"] for place in (0, -1)):
        yield f"{SUSPECT_MARK.strip()}: suspect, see below"
    for line in summary["suspect"]:
        yield f"suspect among the published points: {line}"


MESSAGES = FigureKind(name="messages", draw=draw, tables=tables, extras=extras, inputs=inputs, lacks=lacks)

if __name__ == "__main__":
    main(MESSAGES)
