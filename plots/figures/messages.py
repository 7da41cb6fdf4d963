"""Messages and all-reduces, published and of this machine. python -m plots.figures.messages [--fresh]"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import floor, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from axonn.perf.machine.machine_file import Curve, Library, MachineFile, load_machine
from axonn.training.places import from_here
from experiments.calibration import measure_machine
from plots.figure import FigureKind, main
from plots.figure_records import Content
from plots.published_tables import column, read_reading
from plots.style import COLUMN_IN, LINES, colours, mark, mark_handle
from plots.summary import small_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPERATIONS = {"messages": "point-to-point message", "all_reduce": "all-reduce"}
COLUMNS = {
    "mpi_intra_ms": ("MPI", "inside a node"),
    "mpi_inter_ms": ("MPI", "between two nodes"),
    "nccl_intra_ms": ("NCCL", "inside a node"),
    "nccl_inter_ms": ("NCCL", "between two nodes"),
}
BETWEEN = "between two nodes"
PLACES = {"inside a node": "1 node", "between two nodes": "2 nodes", "shared memory": "1 node", "loopback": "1 node"}
"""Name of each place in the table."""
HERE: dict[Library, tuple[str, str]] = {"mpi": ("MPI", "shared memory"), "nccl": ("Gloo", "loopback")}
"""Library and place of the curves of a local machine file, where Gloo, of torch.distributed, takes NCCL's place."""
OUTLIER = 1.2
"""A point is an outlier if it is slower than both neighbours by this factor, since times grow with the size."""
SUSPECT = 2.0
"""A message between nodes is suspect if it is faster than one inside a node by this factor."""
SUSPECT_MARK = " ?"
"""Suffix of a suspect number in a table."""
FIT = {"published": "", "measured": " (fit)"}
"""Suffix of a curve in the legend."""
STEP = 4
"""Factor from one size of a measured curve to the next."""
LEAST_RANKS = 2
"""Ranks below which nothing is sent, so that the machine file's times are those of copies."""


def local_file() -> Path:
    """Return the machine file that `axonn calibrate` writes."""
    return measure_machine.LOCAL


def lacks(content: Content) -> list[str]:
    """Return a line if this machine was not calibrated, or with a single rank, which sends nothing."""
    path = local_file()
    if path.exists():
        alone = load_machine(path).node.gpus.number < LEAST_RANKS
        return ["messages of this machine are not measured: it was calibrated with a single rank"] if alone else []
    return [f"messages of this machine are not measured ({from_here(path)} is not there); run: axonn calibrate --quick"]


def inputs(content: Content) -> list[Path]:
    """Return the machine file, where there is one."""
    return [path for path in [local_file()] if path.exists()]


def extras(content: Content, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return every curve by kind (bytes and milliseconds, and the sizes of its suspect points), and a line on each
    group of suspect published points."""
    series, suspect = [], []
    for operation, called in OPERATIONS.items():
        table = read_reading(content.experiment, operation)
        sizes = [int(size) for size in column(table, "bytes")]
        times = {name: column(table, name) for name in COLUMNS}
        for name, (library, where) in COLUMNS.items():
            outliers = _outliers(sizes, times[name])
            curve = _series("published", operation, (library, where), zip(sizes, times[name], strict=True))
            series.append(curve | {"suspect_bytes": outliers})
            if outliers:
                suspect.append(f"{called}, {library} {where}: slower than both neighbours at {_list(outliers)} bytes")
        for library in ("mpi", "nccl"):
            inside, between = times[f"{library}_intra_ms"], times[f"{library}_inter_ms"]
            faster = [i for i in range(len(sizes)) if inside[i] > SUSPECT * between[i]]
            if faster:
                # It is the times between nodes that are suspect: they cannot be shorter (`SUSPECT`).
                key = (operation, library.upper(), BETWEEN)
                (curve,) = (s for s in series if (s["what"], s["library"], s["where"]) == key)
                curve["suspect_bytes"] = sorted({*curve["suspect_bytes"], *(sizes[i] for i in faster)})
                factor = max(inside[i] / between[i] for i in faster)
                suspect.append(
                    f"{called}, {library.upper()}: up to {sizes[faster[-1]]} bytes faster between two nodes than "
                    f"inside one, by up to a factor of {factor:.1f}"
                )
    machine = load_machine(local_file()) if local_file().exists() else None
    return {"series": series + ([] if machine is None else _measured(machine)), "suspect": suspect}


def _measured(machine: MachineFile) -> list[dict[str, Any]]:
    """Return the curves of this machine's file; all-reduces are Gloo's."""
    if machine.node.gpus.number < LEAST_RANKS:
        return []
    network = machine.network
    messages = [
        _fitted("messages", name, where, network.p2p[library].intra_node) for library, (name, where) in HERE.items()
    ]
    all_reduce = _fitted("all_reduce", *HERE["nccl"], network.all_reduce.intra_node)
    return [*messages, all_reduce | {"ranks": network.all_reduce.intra_node_ranks.number}]


def _fitted(operation: str, library: str, where: str, curve: Curve) -> dict[str, Any]:
    """Return a measured curve over the sizes that it was fitted on."""
    least, most = curve.segments[0].min_bytes, curve.segments[-1].max_bytes
    sizes = [int(least * STEP**i) for i in range(1 + floor(log(most / least, STEP) + 1e-9))]
    points = ((size, 1e3 * curve.seconds(size)) for size in sizes)
    return _series("measured", operation, (library, where), points) | {
        "suspect_bytes": [],
        "source": curve.fit.source,
        "fit_error_pct": getattr(curve.fit, "in_sample_error_pct", None),
    }


def _series(kind: str, operation: str, path: tuple[str, str], points: Iterable[tuple[int, float]]) -> dict[str, Any]:
    """Return a curve as the summary has it. `path`: library, and where; `points`: bytes and milliseconds."""
    library, where = path
    sizes, times = zip(*points, strict=True)
    return {
        "kind": kind,
        "what": operation,
        "library": library,
        "where": where,
        "bytes": list(sizes),
        "ms": list(times),
    }


def _outliers(sizes: Sequence[int], times: Sequence[float]) -> list[int]:
    """Return the sizes whose time is above that of the next size and of the one before."""
    return [
        sizes[i]
        for i in range(1, len(sizes) - 1)
        if times[i] > OUTLIER * times[i - 1] and times[i] > OUTLIER * times[i + 1]
    ]


def _list(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def draw(summary: dict[str, Any], content: Content) -> Figure:
    """Draw messages and all-reduces, published above and measured below."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(COLUMN_IN, 3.9), constrained_layout=True, sharex=True, sharey=True)
    shades = dict(zip(("MPI", "NCCL", "Gloo"), colours(3), strict=True))
    markers = {"inside a node": "o", "between two nodes": "^", "shared memory": "s", "loopback": "D"}
    for row, (kind, where) in zip(panels, (("published", "Summit"), ("measured", "this machine")), strict=True):
        for axes, operation in zip(row, OPERATIONS, strict=True):
            curves = [s for s in summary["series"] if (s["kind"], s["what"]) == (kind, operation)]
            for s in curves:
                axes.plot(
                    s["bytes"], s["ms"], LINES[kind], color=shades[s["library"]], marker=markers[s["where"]],
                    markersize=2.6, linewidth=0.9, label=f"{s['library']}, {s['where']}{FIT[kind]}",
                    # A fit has no points: one marker, for the legend.
                    markevery=1 if kind == "published" else [0],
                    markerfacecolor=shades[s["library"]] if kind == "published" else "white",
                )  # fmt: skip
                sizes = [size for size in s["bytes"] if size in s["suspect_bytes"]]
                mark(axes, sizes, [s["ms"][s["bytes"].index(size)] for size in sizes], "suspect")
            _label(axes, f"{operation.replace('_', '-')}, {where}\n({kind})")
            if not curves:
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
    """Return the mark of the point in this place of a curve, if it is suspect."""
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
    """Yield the time at the smallest size, and the bandwidth at the largest."""
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
