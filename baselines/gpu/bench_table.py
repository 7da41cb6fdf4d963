"""The one table that the benchmark prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from baselines.gpu.bench_rows import BenchRow, PartResult

COLUMNS = ("part", "model", "who", "ms/batch", "per s", "TFLOP/s", "of peak", "AxoNN /", "GB", "by model", "result")


def table_of(parts: Mapping[str, PartResult], *, title: str) -> Table:
    """Return the table of all rows; a failed one has its reason as its result."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in COLUMNS:
        words = name in ("part", "model", "who", "result")
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    for name, part in parts.items():
        previous = None
        for row in part.rows:
            cells = cells_of(row)
            table.add_row(name if previous is None else "", row.model if row.model != previous else "", *cells)
            previous = row.model
        table.add_section()
    return table


def cells_of(row: BenchRow) -> list[str]:
    """Return the cells of a row without part and model."""
    after = row.memory.get("after_init", row.memory.get("batch_peak"))
    return [
        row.contender,
        _number(None if row.seconds is None else 1e3 * row.seconds, 2),
        "" if row.units_per_s is None else f"{row.units_per_s:,.0f} {row.unit}",
        _number(row.tflops, 3 if row.tflops is not None and row.tflops < 1 else 1),
        "" if row.pct_peak is None else f"{row.pct_peak:.1f}%",
        "" if row.ratio is None else f"{row.ratio:.3f}" + ("" if row.paired else " *"),
        _number(None if after is None else after / 1e9, 3 if after is not None and after < 1e9 else 2),
        "" if row.model_error_pct is None else f"{row.model_error_pct:+.1f}%",
        result_of(row),
    ]


def result_of(row: BenchRow) -> str:
    """Return the remarks of a row beside its numbers."""
    if row.failure is not None:
        return f"{row.failure.cause}: {row.failure.detail}"
    notes: list[str] = []
    if row.share is not None:
        notes.append(f"{100 * row.share:.0f}% of {row.share_of}")
    if row.loss_difference is not None and row.tolerance is not None:
        notes.append(f"losses within {row.loss_difference:.1e} (allowed {row.tolerance:.0e})")
    if row.predicted_s is not None and row.error_pct is not None:
        notes.append(f"predicted {1e3 * row.predicted_s:.2f} ms, {row.error_pct:+.1f}%")
    if "step_peak" in row.memory and "batch_peak" in row.memory:
        peaks = (row.memory[name] / 1e9 for name in ("step_peak", "batch_peak"))
        notes.append("peak {:.2f} GB in the step, {:.2f} GB in a batch".format(*peaks))
    if row.parameters is not None and row.part == "largest":
        notes.append(f"{row.parameters / 1e6:,.1f} million parameters")
    if row.note is not None and row.part in ("largest", "overlap"):
        notes.append(row.note)
    return "; ".join(notes)


def remarks(parts: Mapping[str, PartResult], names: Sequence[str]) -> list[str]:
    """Return the lines below the table."""
    lines = []
    gpt: dict[str, Any] = parts["gpt"].about if "gpt" in parts else {}
    peak = gpt.get("peak") or {}
    if peak:
        lines.append(f"of peak: {peak.get('tflops', 0):.1f} TFLOP/s, {peak['source']}")
        if peak.get("product_tflops") is not None:
            size = peak.get("product_size")
            lines.append(f"best bfloat16 product measured here ({size}): {peak['product_tflops']:.1f} TFLOP/s")
    if gpt.get("formula"):
        lines.append(f"TFLOP/s of a GPT: {gpt['formula']}, recompute not counted; of a U-Net: 3 x forward")
    lines.append(
        "AxoNN /: its seconds over this contender's, median of paired rounds; *: not in turns, one after the other"
    )
    lines.append(
        "GB: model state on the device after initialisation (or else the peak of a batch); by model: error of the model"
    )
    ratio = (parts["offload"].about if "offload" in parts else {}).get("offloaded_over_resident")
    if ratio is not None:
        lines.append(f"model state on the device, offloaded over resident: {ratio:.3f}")
    missing = [name for name in names if name not in parts]
    if missing:
        lines.append(f"not measured: {', '.join(missing)}")
    return lines


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
