"""Figure 5: the trace of the tensor-parallel algorithm. python -m plots.figures.fig5 [--fresh]"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from experiments.definition import ROOT, load_model
from plots import style
from plots.figure import Content, FigureKind, main
from plots.style import PAGE_IN
from plots.summary import BUSY_MARK, elsewhere, here, machine_of, rows_of
from plots.timeline_picture import ROW_IN, Legend, View, draw_rank, full_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCKS = 2
"""Of the predicted trace, so many layers of the transformer in the middle are drawn."""
SPAN_KINDS = ("predicted", "measured")
"""Kinds that have spans."""
_AGREE = 1e-6
Row = dict[str, Any]


def spans_of_row(content: Content, row: Row) -> list[Span]:
    """The spans that a row's overlap was computed from: all batches after warm-up. Raises `RecordError` without them,
    or when they are not those of the record."""
    folder = Path(row["run_folder"] or "")
    files = sorted((PROJECT / folder).glob("spans-*.parquet"))
    if row["kind"] == "predicted":
        spans = [s for own in files for file in span_files(own) for s in read_spans(file)]
        batches = 1
    else:
        runs = content.experiment.runs
        assert runs is not None
        config = runs.configs(where=content.experiment.name)[row["point"]]
        first, last = runs.warmup_batches, config.steps
        spans = spans_of(runner.PROJECT / folder, config, first=first, last=last)
        batches = last - first
    if not spans:
        raise RecordError(f"{row['point']} has no spans in {folder}; make them again with --fresh")
    own = [value / batches for value in overlap(spans)]
    known = Overlap(**row["overlap_s"]) if row["overlap_s"] else None
    if known is None or any(abs(a - b) > _AGREE * max(own) for a, b in zip(own, known, strict=True)):
        raise RecordError(f"{row['point']}: the spans in {folder} are not those of its record; make both again")
    return spans


def _rows(content: Content) -> list[Row]:
    """Those that are drawn."""
    rows = rows_of([], [*content.predicted, *content.measured])
    return [row for kind in SPAN_KINDS for row in _of_kind(content, rows, kind)]


def lacks(content: Content) -> list[str]:
    """Spans that are not there, or not those of their record."""
    found = []
    for row in _rows(content):
        try:
            spans_of_row(content, row)
        except RecordError as error:
            found.append(str(error))
    return found


def inputs(content: Content) -> list[Path]:
    """The span files, and the code that writes traces."""
    found = [ROOT / "axonn" / "trace_events.py"]
    for row in _rows(content):
        root = PROJECT if row["kind"] == "predicted" else runner.PROJECT
        found += sorted((root / (row["run_folder"] or "")).glob("spans-*.parquet/[0-9]*.parquet"))
    return found


def outputs(content: Content) -> list[Path]:
    """The trace files."""
    return [trace_file(kind) for kind in dict.fromkeys(row["kind"] for row in _rows(content))]


def extras(content: Content, rows: list[Row]) -> dict[str, Any]:
    """How much of the collectives of each row ran under compute, in seconds of a batch, and the trace files."""
    shares = []
    others = [row for own in elsewhere(rows).values() for row in own if row["overlap_s"]]
    for row in [*(row for kind in SPAN_KINDS for row in _of_kind(content, rows, kind)), *others]:
        found = Overlap(**row["overlap_s"])
        shares.append(
            {key: row[key] for key in ("kind", "point", "framework", "batch_time_s")}
            | found._asdict()
            | {"hidden_share": found.hidden_share, "reached": found.reached}
            | ({"machine": machine_of(row)} if row in others else {})
            | ({"machine_busy": True} if row.get("busy") else {})
        )
    return {
        "overlap": shares,
        "traces": {kind: in_project(trace_file(kind)) for kind in SPAN_KINDS if _of_kind(content, rows, kind)},
    }


def trace_file(kind: str) -> Path:
    """Of the points of a kind."""
    return style.OUT / f"fig5-{kind}.trace.json"


def _of_kind(content: Content, rows: Sequence[Row], kind: str) -> list[Row]:
    """Those with an overlap, in the order of the experiment."""
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
    """One file for each kind; the ranks of its points one after another, all beginning at 0."""
    for kind in SPAN_KINDS:
        joined: list[Span] = []
        names: dict[int, str] = {}
        for row in _of_kind(content, rows, kind):
            spans = _there(content, row)
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


def _there(content: Content, row: Row | None) -> list[Span]:
    """The spans of a row; nothing where something is wrong with them, which `inputs` has said."""
    try:
        return [] if row is None else spans_of_row(content, row)
    except RecordError:
        return []


def layer_names(model: GPTConfig) -> dict[int, str]:
    """By what spans call a layer, a link of the model's chain: the transformer's layer, counted from 1, and A for its
    attention, M for its MLP."""
    return {
        i: f"{link.block + 1}{'A' if link.name.startswith('attention') else 'M'}"
        for i, link in enumerate(outline_of(model).links)
        if link.block is not None
    }


def windows(spans: Sequence[Span], names: Mapping[int, str], *, blocks: int = BLOCKS) -> list[View]:
    """Of a predicted task with one chunk: the same layers in the middle, forward and then backward.

    The backward is what follows the recomputation, which the model puts in front of it: it begins at the last layer.
    """
    last = max(s.layer for s in spans)
    begin = min(names) + 2 * ((len(names) // 2 - blocks) // 2)
    middle = range(begin, begin + 2 * blocks)
    forward = [s for s in spans if s.kind == SpanKind.FORWARD]
    backward = [s for s in spans if s.kind == SpanKind.BACKWARD]
    turn = min(s.start for s in backward if s.layer == last)
    found = []
    for task in (forward, [s for s in backward if s.start > turn]):
        own = [s for s in task if s.layer in middle]
        start, end = min(s.start for s in own), max(s.end for s in own)
        found.append(View(begin=start, end=end, ranks=(0,), layers=names))
    return found


def share_of(row: Row) -> str:
    """How much of the collectives' time is hidden, in words."""
    found = Overlap(**row["overlap_s"])
    return f"{found.hidden_share:.0%} of {found.collective:.3g} s"


def _versus(rows: Sequence[Row]) -> str:
    """The second point with the first, where they differ in the sub-shards alone."""
    if len(rows) < 2 or rows[0]["grid"] != rows[1]["grid"] or rows[1]["sub_shards"] is None:
        return ""
    return f"; with {_sub_shards(rows[1])} {share_of(rows[1])}"


def _sub_shards(row: Row) -> str:
    count = row["sub_shards"]
    return f"{count} sub-shard{'' if count == 1 else 's'}"


def draw(summary: dict[str, Any], content: Content) -> Figure:
    """Forward and backward of a few layers at the published scale; below, a batch of the ranks here."""
    import matplotlib.pyplot as plt

    write_traces(content, summary["rows"])
    predicted, measured = (_of_kind(content, summary["rows"], kind) for kind in SPAN_KINDS)
    panels: list[tuple[str, list[Span], View, int]] = []
    spans = _there(content, predicted[0] if predicted else None)
    if spans:
        row = predicted[0]
        grid = f"{row['grid']['row']} x {row['grid']['col']}"
        title = (
            f"Predicted: {row['model'].replace('-', ' ').upper()}, grid {grid}, {_sub_shards(row)}, one of "
            f"{row['gpus']} GPUs of {str(row['machine']).capitalize()} (all do the same)\n"
            f"Hidden of the collectives, whole batch: {share_of(row)}{_versus(predicted)}\n"
        )
        model = load_model(row["model"])
        assert isinstance(model, GPTConfig)
        views = windows(spans, layer_names(model))
        which = f"{BLOCKS} of {model.layers} layers (number of the layer; A attention, M MLP)"
        panels.append((f"{title}Forward of {which}", spans, views[0], 0))
        panels.append(("Backward of the same layers, after the recomputation", spans, views[1], 0))
    spans = _there(content, measured[0] if measured else None)
    if spans:
        row = measured[0]
        steps = sorted({s.step for s in spans})
        shown = steps[len(steps) // 2]
        one = [s for s in spans if s.step == shown]
        hidden = f"{share_of(row)}{_versus(measured)}"
        busy = " while the machine was busy" if row["busy"] else ""
        title = (
            f"Measured{busy}: {row['model']}, {_sub_shards(row)}, {row['gpus']} ranks of this machine (CPU), "
            f"batch {shown}\n"
            f"Hidden of the collectives, mean of batches {steps[0]} to {steps[-1]}: {hidden}\n"
        )
        view = full_view(one)
        panels += [(f"{title if rank == 0 else ''}Rank {rank}", one, view, rank) for rank in view.ranks]
    rows = [len(view.rows(spans, rank)) for _, spans, view, rank in panels]
    heights = [(0.5 + 0.14 * title.count("\n") + ROW_IN * n) for (title, *_), n in zip(panels, rows, strict=True)]
    figure, grid_of_axes = plt.subplots(
        max(1, len(panels)),
        1,
        figsize=(PAGE_IN, 1.2 + sum(heights) if panels else 2.0),
        height_ratios=rows or [1],
        squeeze=False,
        constrained_layout=True,
    )
    legend = Legend()
    for axes, (title, own, view, rank) in zip(grid_of_axes[:, 0], panels, strict=False):
        draw_rank(axes, own, view, rank, legend)
        axes.set_title(title, fontsize=7, loc="left", pad=3)
        axes.set_xlabel("milliseconds", fontsize=6.5, labelpad=1)
    if panels:
        legend.draw(figure, columns=3)
    else:
        grid_of_axes[0, 0].set_axis_off()
        grid_of_axes[0, 0].text(0.5, 0.5, "neither predicted nor measured", ha="center")
    figure.suptitle(summary["title"], fontsize=9)
    return figure


def tables(summary: dict[str, Any], content: Content) -> Iterator[RenderableType]:
    """Batch times and what is hidden."""
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
