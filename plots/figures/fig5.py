"""Figure 5: the trace of the tensor-parallel algorithm. python -m plots.figures.fig5 [--fresh]"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

from axonn.errors import RecordError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import outline_of
from axonn.observability.perfetto_events import write_trace
from axonn.spans import Overlap, Span, SpanKind, overlap, read_spans, span_files
from axonn.training.places import PROJECT, in_project
from axonn.training.run_record import spans_of
from experiments import runner
from experiments.definition import load_model
from plots import style
from plots.figure import FigureKind, main
from plots.figure_records import Content
from plots.style import PAGE_IN
from plots.summary import BUSY_MARK, elsewhere, here, machine_of, rows_of
from plots.timeline_picture import ROW_IN, Legend, View, draw_rank, full_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCKS = 2
"""Layers of the transformer that are drawn, in the middle of the predicted trace."""
SPAN_KINDS = ("predicted", "measured")
"""Kinds of points that have spans."""
_AGREE = 1e-6
"""Relative difference up to which the overlap of spans agrees with that of their record."""
Row = dict[str, Any]


def spans_of_row(content: Content, row: Row) -> list[Span]:
    """Return the spans that a row's overlap was computed from: all batches after warm-up.

    Raises `RecordError` without them, or when they are not those of the record.
    """
    folder = row["run_folder"] or "."
    if row["kind"] == "predicted":
        folders = sorted(_run_folder(row).glob("spans-*.parquet"))
        spans = [s for of_rank in folders for file in span_files(of_rank) for s in read_spans(file)]
        batches = 1
    else:
        runs = content.experiment.runs
        assert runs is not None
        config = runs.configs(where=content.experiment.name)[row["point"]]
        first, last = runs.warmup_batches, config.steps
        spans = spans_of(_run_folder(row), config, first=first, last=last)
        batches = last - first
    if not spans:
        raise RecordError(f"{row['point']} has no spans in {folder}; make them again with --fresh")
    counted = [value / batches for value in overlap(spans)]
    recorded = Overlap(**row["overlap_s"]) if row["overlap_s"] else None
    if recorded is None or any(abs(a - b) > _AGREE * max(counted) for a, b in zip(counted, recorded, strict=True)):
        raise RecordError(f"{row['point']}: the spans in {folder} are not those of its record; make both again")
    return spans


def _run_folder(row: Row) -> Path:
    """Return the folder of a row's spans: a measured one's is among the runs of the experiments."""
    root = PROJECT if row["kind"] == "predicted" else runner.RUNS.parent
    return root / (row["run_folder"] or "")


def _rows(content: Content) -> list[Row]:
    """Return the rows that are drawn."""
    rows = rows_of([], [*content.predicted, *content.measured])
    return [row for kind in SPAN_KINDS for row in _of_kind(content, rows, kind)]


def lacks(content: Content) -> list[str]:
    """Return a line for each row whose spans are missing, or not those of its record."""
    lines = []
    for row in _rows(content):
        try:
            spans_of_row(content, row)
        except RecordError as error:
            lines.append(str(error))
    return lines


def inputs(content: Content) -> list[Path]:
    """Return the span files."""
    return [path for row in _rows(content) for path in sorted(_run_folder(row).glob("spans-*.parquet/[0-9]*.parquet"))]


def outputs(content: Content) -> list[Path]:
    """Return the trace files."""
    return [trace_file(kind) for kind in dict.fromkeys(row["kind"] for row in _rows(content))]


def extras(content: Content, rows: list[Row]) -> dict[str, Any]:
    """Return the seconds of a batch that the collectives of each row ran under compute, and the trace files."""
    shares = []
    on_others = [row for machine_rows in elsewhere(rows).values() for row in machine_rows if row["overlap_s"]]
    for row in [*(row for kind in SPAN_KINDS for row in _of_kind(content, rows, kind)), *on_others]:
        hidden = Overlap(**row["overlap_s"])
        shares.append(
            {key: row[key] for key in ("kind", "point", "framework", "batch_time_s")}
            | hidden._asdict()
            | {"hidden_share": hidden.hidden_share, "reached": hidden.reached}
            | ({"machine": machine_of(row)} if row in on_others else {})
            | ({"machine_busy": True} if row.get("busy") else {})
        )
    return {
        "overlap": shares,
        "traces": {kind: in_project(trace_file(kind)) for kind in SPAN_KINDS if _of_kind(content, rows, kind)},
    }


def trace_file(kind: str) -> Path:
    """Return the trace file of the points of a kind."""
    return style.OUT / f"fig5-{kind}.trace.json"


def _of_kind(content: Content, rows: Sequence[Row], kind: str) -> list[Row]:
    """Return the rows of a kind that have an overlap, in the order of the experiment."""
    runs, panel = content.experiment.runs, content.experiment.predicted
    points = [point.name for point in panel.points] if panel is not None else []
    order = [*points, *(runs.runs if runs is not None else ())]
    return sorted(
        (
            row
            for row in rows
            if row["kind"] == kind and (kind == "predicted" or here(row)) and row["overlap_s"] and row["point"] in order
        ),
        key=lambda row: order.index(row["point"]),
    )


def write_traces(content: Content, rows: Sequence[Row]) -> None:
    """Write one trace file for each kind, with the ranks of its points one after another, all beginning at 0."""
    for kind in SPAN_KINDS:
        joined: list[Span] = []
        names: dict[int, str] = {}
        for row in _of_kind(content, rows, kind):
            spans = _usable_spans(content, [row])
            origin = min((s.start for s in spans), default=0.0)
            first = len(names)
            for rank in sorted({s.rank for s in spans}):
                names[first + rank] = f"{kind}, {row['point']}: {_who(row, rank)}"
            joined += [
                s._replace(
                    rank=first + s.rank,
                    peer=s.peer if s.peer < 0 else first + s.peer,
                    start=s.start - origin,
                    end=s.end - origin,
                )
                for s in spans
            ]
        if joined:
            about = {"kind": kind, "title": content.experiment.title}
            write_trace(trace_file(kind), joined, names=names, about=about)


def _who(row: Row, rank: int) -> str:
    return f"each of {row['gpus']} GPUs" if row["kind"] == "predicted" else f"rank {rank}"


def _usable_spans(content: Content, rows: Sequence[Row]) -> list[Span]:
    """Return the spans of the first row; none where something is wrong with them, which `lacks` has reported."""
    try:
        return spans_of_row(content, rows[0]) if rows else []
    except RecordError:
        return []


def layer_names(model: GPTConfig) -> dict[int, str]:
    """Return the label of each layer by its number in spans, which is that of a link in the model's chain.

    A label is the transformer's layer, counted from 1, and A for its attention or M for its MLP.
    """
    return {
        i: f"{link.block + 1}{'A' if link.name.startswith('attention') else 'M'}"
        for i, link in enumerate(outline_of(model).links)
        if link.block is not None
    }


def windows(spans: Sequence[Span], names: Mapping[int, str], *, blocks: int = BLOCKS) -> list[View]:
    """Return the windows of the same layers in the middle of a predicted batch of one chunk, forward and backward.

    The model puts the recomputation in front of the backward, which begins at the last layer.
    """
    last = max(s.layer for s in spans)
    begin = min(names) + 2 * ((len(names) // 2 - blocks) // 2)
    middle = range(begin, begin + 2 * blocks)
    forward = [s for s in spans if s.kind == SpanKind.FORWARD]
    backward = [s for s in spans if s.kind == SpanKind.BACKWARD]
    recomputed = min(s.start for s in backward if s.layer == last)
    views = []
    for task in (forward, [s for s in backward if s.start > recomputed]):
        shown = [s for s in task if s.layer in middle]
        start, end = min(s.start for s in shown), max(s.end for s in shown)
        views.append(View(begin=start, end=end, ranks=(0,), layers=names))
    return views


def share_of(row: Row) -> str:
    """Describe how much of the collectives' time is hidden."""
    hidden = Overlap(**row["overlap_s"])
    return f"{hidden.hidden_share:.0%} of {hidden.collective:.3g} s"


def _versus(rows: Sequence[Row]) -> str:
    """Compare the second row with the first, where they differ only in the sub-shards."""
    if len(rows) < 2 or rows[0]["grid"] != rows[1]["grid"] or rows[1]["sub_shards"] is None:
        return ""
    return f"; with {_sub_shards(rows[1])} {share_of(rows[1])}"


def _sub_shards(row: Row) -> str:
    count = row["sub_shards"]
    return f"{count} sub-shard{'' if count == 1 else 's'}"


@dataclass(frozen=True, kw_only=True)
class RankPanel:
    """A window of one rank's spans, under a title."""

    title: str
    spans: list[Span]
    view: View
    rank: int


def draw(summary: dict[str, Any], content: Content) -> Figure:
    """Draw forward and backward of a few layers at the published scale; below them, a batch of the ranks here."""
    import matplotlib.pyplot as plt

    write_traces(content, summary["rows"])
    predicted, measured = (_of_kind(content, summary["rows"], kind) for kind in SPAN_KINDS)
    panels = [*_predicted_panels(content, predicted), *_measured_panels(content, measured)]
    row_counts = [len(panel.view.rows(panel.spans, panel.rank)) for panel in panels]
    heights = [
        0.5 + 0.14 * panel.title.count("\n") + ROW_IN * count for panel, count in zip(panels, row_counts, strict=True)
    ]
    figure, grid_of_axes = plt.subplots(
        max(1, len(panels)),
        1,
        figsize=(PAGE_IN, 1.2 + sum(heights) if panels else 2.0),
        height_ratios=row_counts or [1],
        squeeze=False,
        constrained_layout=True,
    )
    legend = Legend()
    for axes, panel in zip(grid_of_axes[:, 0], panels, strict=False):
        draw_rank(axes, panel.spans, panel.view, panel.rank, legend)
        axes.set_title(panel.title, fontsize=7, loc="left", pad=3)
        axes.set_xlabel("milliseconds", fontsize=6.5, labelpad=1)
    if panels:
        legend.draw(figure, columns=3)
    else:
        grid_of_axes[0, 0].set_axis_off()
        grid_of_axes[0, 0].text(0.5, 0.5, "neither predicted nor measured", ha="center")
    figure.suptitle(summary["title"], fontsize=9)
    return figure


def _predicted_panels(content: Content, rows: Sequence[Row]) -> list[RankPanel]:
    """Return forward and backward of a few layers of the first predicted row."""
    spans = _usable_spans(content, rows)
    if not spans:
        return []
    row = rows[0]
    grid = f"{row['grid']['row']} x {row['grid']['col']}"
    title = (
        f"Predicted: {row['model'].replace('-', ' ').upper()}, grid {grid}, {_sub_shards(row)}, one of "
        f"{row['gpus']} GPUs of {str(row['machine']).capitalize()} (all do the same)\n"
        f"Hidden of the collectives, whole batch: {share_of(row)}{_versus(rows)}\n"
    )
    model = load_model(row["model"])
    assert isinstance(model, GPTConfig)
    forward, backward = windows(spans, layer_names(model))
    layers = f"{BLOCKS} of {model.layers} layers (number of the layer; A attention, M MLP)"
    return [
        RankPanel(title=f"{title}Forward of {layers}", spans=spans, view=forward, rank=0),
        RankPanel(title="Backward of the same layers, after the recomputation", spans=spans, view=backward, rank=0),
    ]


def _measured_panels(content: Content, rows: Sequence[Row]) -> list[RankPanel]:
    """Return one batch of the first measured row, a panel for each rank."""
    spans = _usable_spans(content, rows)
    if not spans:
        return []
    row = rows[0]
    steps = sorted({s.step for s in spans})
    step = steps[len(steps) // 2]
    batch = [s for s in spans if s.step == step]
    busy = " while the machine was busy" if row["busy"] else ""
    title = (
        f"Measured{busy}: {row['model']}, {_sub_shards(row)}, {row['gpus']} ranks of this machine (CPU), "
        f"batch {step}\n"
        f"Hidden of the collectives, mean of batches {steps[0]} to {steps[-1]}: {share_of(row)}{_versus(rows)}\n"
    )
    view = full_view(batch)
    return [
        RankPanel(title=f"{title if rank == 0 else ''}Rank {rank}", spans=batch, view=view, rank=rank)
        for rank in view.ranks
    ]


def tables(summary: dict[str, Any], content: Content) -> Iterator[RenderableType]:
    """Yield batch times and the hidden share of the collectives."""
    table = Table(title="Collectives of the tensor axes, seconds of a batch", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind")
    table.add_column("point", no_wrap=True)
    for name in ("batch", "collectives", "hidden", "share"):
        table.add_column(name, justify="right")
    for row in summary["overlap"]:
        table.add_row(
            " on ".join(filter(None, (row["kind"], row.get("machine")))),
            row["point"] + (BUSY_MARK if row.get("machine_busy") else ""),
            *(f"{row[name]:.3f}" for name in ("batch_time_s", "collective", "hidden")),
            f"{row['hidden_share']:.1%}",
        )
    yield table
    for kind, path in summary["traces"].items():
        yield f"{kind} trace, for chrome://tracing or ui.perfetto.dev: {path}"


FIG5 = FigureKind(name="fig5", draw=draw, tables=tables, extras=extras, inputs=inputs, lacks=lacks, outputs=outputs)

if __name__ == "__main__":
    main(FIG5)
