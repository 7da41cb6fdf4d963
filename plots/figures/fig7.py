"""Figure 7: weak scaling of tensor parallelism, our and Megatron-LM's scheme. python -m plots.figures.fig7 [--fresh]"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

from axonn.config.train_config import TrainConfig
from axonn.models.registry import outline_of
from axonn.models.unet.unet_config import UNetConfig
from axonn.perf.planner.engine_strategy import strategy_of_config
from axonn.perf.timing.bytes_sent import bytes_by_axis
from experiments.definition import OURS, load_model
from experiments.published_points import published_ratios
from experiments.validation.published_sets import FOLDER
from plots.figure import FigureKind, main
from plots.figure_records import Content
from plots.figures.fig7_panels import GB, MB, SCHEME, axis_of, bytes_along, draw, measured_here
from plots.summary import BUSY_MARK, elsewhere, here, machine_of


def extras(content: Content, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return speedups, published and predicted, grid and bytes of each GPU, and bytes of each rank here, counted and
    modelled."""
    sizes = {r.asked.model: r.asked.parameters for r in content.predicted}
    shards = {(r.point, r.ran.framework): r.ran.overdecomposition for r in content.predicted}
    per_gpu = [
        {
            "framework": r["framework"],
            "model": r["model"],
            "parameters": sizes[r["model"]],
            "image_size": _image_size(r["model"]),
            "gpus": r["gpus"],
            "kind": r["kind"],
            "batch_time_s": r["batch_time_s"],
            "grid": r["grid"],
            "microbatch_size": r["microbatch_size"],
            "sub_shards": shards.get((r["point"], r["framework"])),
            "tensor_bytes": sum(bytes_along(r, axis) for axis in ("row", "col")),
            "data_bytes": bytes_along(r, "data"),
            "chosen": r["note"],
        }
        for r in rows
        if r["kind"] == "predicted"
    ]
    return {
        "families": {
            "main": "32 pixels: the rule of experiments/validation/poster-unet.yaml",
            "other": "128 pixels: the other networks of these sizes that the suite ships",
        },
        "per_gpu": per_gpu,
        "speedups": _speedups(content, per_gpu),
        "bytes_here": _bytes_here(content, rows),
    }


def _image_size(model: str) -> int | None:
    config = load_model(model)
    return config.image_size if isinstance(config, UNetConfig) else None


def _speedups(content: Content, per_gpu: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the speedups of our tensor parallelism over Megatron-LM's scheme.

    A published one has no seconds, and is that of one network size.
    """
    ratios = published_ratios(content.experiment)
    speedups: list[dict[str, Any]] = [
        {"kind": "published", "gpus": r.gpus, "model": "28B parameters", "value": r.value, "source": r.source}
        for r in ratios
    ]
    published = {r.gpus: r.value for r in ratios}
    times = {(r["framework"], r["model"], r["gpus"]): r["batch_time_s"] for r in per_gpu}
    for (framework, model, gpus), seconds in times.items():
        scheme_seconds = times.get((SCHEME, model, gpus))
        if framework != OURS or scheme_seconds is None:
            continue
        value, known = scheme_seconds / seconds, published.get(gpus)
        speedups.append(
            {
                "kind": "predicted",
                "gpus": gpus,
                "model": model,
                "image_size": _image_size(model),
                "value": value,
                "published": known,
                "error_pct": None if known is None else 100 * (value / known - 1),
            }
        )
    return speedups


def _bytes_here(content: Content, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the bytes that a rank sends for a batch of each measured point, as counted in the run and as modelled."""
    runs = content.experiment.runs
    configs = {} if runs is None else runs.configs(where=content.experiment.name)
    points = []
    for row in rows:
        if row["kind"] != "measured" or row["point"] not in configs:
            continue
        counted = {axis_of(axis): size for axis, size in (row["bytes_per_batch"] or {}).items()}
        modelled = modelled_bytes(configs[row["point"]])
        agree = counted == modelled
        machine = {} if here(row) else {"machine": machine_of(row)}
        points.append({"point": row["point"], "counted": counted, "modelled": modelled, "agree": agree} | machine)
    return points


def modelled_bytes(config: TrainConfig) -> dict[str, int]:
    """Return the bytes that a rank sends for a batch according to the communication model, by axis."""
    sizes = bytes_by_axis(outline_of(config.model), strategy_of_config(config), batch_size=config.batch_size)
    return {axis_of(axis): size for axis, size in sizes.items()}


def tables(summary: dict[str, Any], content: Content) -> Iterator[RenderableType]:
    """Yield all panels in numbers."""
    yield _scale_table(summary)
    for s in summary["speedups"]:
        if s["kind"] == "published":
            predicted = [p for p in summary["speedups"] if p["kind"] == "predicted" and p["gpus"] == s["gpus"]]
            ways = ", ".join(f"{p['value']:.2f} with {p['model']} ({p['error_pct']:+.0f}%)" for p in predicted)
            yield f"speedup on {s['gpus']} GPUs: published {s['value']:g} (a ratio, no time); predicted {ways or '-'}"
    yield f"G_row=1: {SCHEME}; microbatch / sub-shards where there are 2"
    yield _bytes_table(summary)


def _scale_table(summary: Mapping[str, Any]) -> Table:
    """Return the predicted points at the published scale."""
    table = _table("At the published scale, predicted; GB that a GPU sends", "model", "GPUs", "")
    for name in ("data x row\nx col", "micro-\nbatch", "s per\nbatch", "row\n+ col", "data", "speed\nup"):
        table.add_column(name, justify="right", no_wrap=True)
    speedups = {(s["model"], s["gpus"]): s["value"] for s in summary["speedups"] if s["kind"] == "predicted"}
    previous = None
    for row in sorted(summary["per_gpu"], key=lambda r: (r["image_size"] or 0, r["gpus"], r["framework"] != OURS)):
        if previous not in (None, row["model"]):
            table.add_section()
        previous = row["model"]
        g, shards = row["grid"], row["sub_shards"]
        ours = row["framework"] == OURS
        ratio = speedups.get((row["model"], row["gpus"]))
        table.add_row(
            row["model"],
            str(row["gpus"]),
            OURS if ours else "G_row=1",
            f"{g['data']} x {g['row']} x {g['col']}",
            f"{row['microbatch_size']}" + (f" / {shards}" if shards and shards > 1 else ""),
            f"{row['batch_time_s']:.3f}",
            f"{row['tensor_bytes'] / GB:.4g}",
            f"{row['data_bytes'] / GB:.1f}",
            f"{ratio:.2f}" if ours and ratio is not None else "",
        )
    return table


def _bytes_table(summary: Mapping[str, Any]) -> Table:
    """Return the measured points of this machine and of others, with the bytes that a rank sends."""
    counted = _table("Measured here, the same work at every grid; MB that a rank sends", "G_row x G_col", "ranks")
    for name in ("median\ns", "least", "most", "row\nMB", "col\nMB", "model"):
        counted.add_column(name, justify="right", no_wrap=True)
    sent = {(b["point"], b.get("machine")): b for b in summary["bytes_here"]}
    on_others = [row for machine_rows in elsewhere(summary["rows"]).values() for row in machine_rows]
    for row in [*measured_here(summary), *on_others]:
        machine = None if here(row) else machine_of(row)
        b = sent.get((row["point"], machine), {"counted": {}, "agree": False})
        counted.add_row(
            f"{row['grid']['row']} x {row['grid']['col']}"
            + (f" on {machine}" if machine else "")
            + (BUSY_MARK if row["busy"] else ""),
            str(row["gpus"]),
            f"{row['batch_time_s']:.3f}",
            f"{min(row['repeats_s']):.3f}",
            f"{max(row['repeats_s']):.3f}",
            *(f"{b['counted'].get(axis, 0) / MB:.2f}" for axis in ("row", "col")),
            "the same" if b["agree"] else "differs",
        )
    return counted


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def inputs(content: Content) -> list[Path]:
    """Return the file of the published ratio and the networks."""
    ratios = content.experiment.ratios
    return [] if ratios is None else [FOLDER / f"{ratios}.yaml"]


FIG7 = FigureKind(name="fig7", draw=draw, tables=tables, extras=extras, inputs=inputs)

if __name__ == "__main__":
    main(FIG7)
