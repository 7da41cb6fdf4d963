"""The measurements of make bench-gpu, as a section of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from axonn.errors import RecordError
from plots import figure
from plots.figures import gpu
from plots.report.evidence import Evidence, minute_of
from plots.report.figure_sections import machine_text, picture_of
from plots.report.report_tables import (
    Column,
    ReportTable,
    entry,
    errors,
    mapping,
    numbers,
    percents,
    ratios,
    seconds,
    significant,
    sizes,
    table,
    texts,
)

TITLES = {
    "gpt": "GPTs in bfloat16: AxoNN, plain PyTorch and other frameworks",
    "offload": "The memory optimisation",
    "overlap": "What is hidden under compute",
    "unet": "A diffusion U-Net in bfloat16",
    "grids": "Grids of ranks that share the one GPU, against one rank",
    "predicted": "The performance model beside these GPTs",
    "largest": "The largest GPT that trains on this GPU",
}
"""Captions by the name of the part."""


def on_gpu() -> Evidence:
    """Return the evidence of results/gpu/summary.json; all numbers are measured unless they say otherwise."""
    path = figure.RESULTS / "gpu" / "summary.json"
    if not path.exists():
        return Evidence(
            command=gpu.COMMAND,
            lacking=[
                f"Nothing has been measured on a GPU here; on a machine with one, run: {gpu.COMMAND}",
                "The same in miniature on a CPU, for trying it: make bench-gpu DEVICE=cpu QUICK=1 (kept apart, in "
                "results/gpu/cpu, and not shown on this page).",
            ],
        )
    try:
        summary = gpu.load(path)
    except RecordError:
        return Evidence(command=gpu.COMMAND, lacking=[f"{path.name} is no summary of a run; run: {gpu.COMMAND}"])
    rows: list[dict[str, Any]] = summary["rows"]
    parts = mapping(summary.get("parts"))
    provenance = mapping(summary.get("provenance"))
    machine = mapping(provenance.get("machine"))
    lacking = ["This was the miniature, whose times mean nothing."] if summary.get("quick") else []
    lacking += [
        f"Part {name} was not measured; run: {gpu.COMMAND} OPTIONS='--only {name}'"
        for name in TITLES
        if name not in parts
    ]
    lacking += [
        f"{row.get('part')}: {row.get('model')}, {row.get('contender')}: {row['failure'].get('cause')}: "
        f"{row['failure'].get('detail')}"
        for row in rows
        if isinstance(row.get("failure"), dict)
    ]
    return Evidence(
        command=str(provenance.get("command") or gpu.COMMAND),
        lacking=lacking,
        remarks=_remarks(summary, parts, machine),
        tables=[t for name in TITLES if (t := _table(name, rows)).rows],
        picture=picture_of(
            "gpu",
            "Bars: measured TFLOP/s of GPTs and a U-Net, of AxoNN and of others; model state on the device without and "
            "with offloading; shares of copies and collectives that are hidden. The tables below have the numbers.",
        ),
        machine=machine or None,
    )


def _remarks(summary: Mapping[str, Any], parts: Mapping[str, Any], machine: Mapping[str, Any]) -> list[str]:
    provenance = mapping(summary.get("provenance"))
    clocks = ", ".join(f"{name} {value:g}" for name, value in mapping(machine.get("clocks")).items())
    lines = [
        f"Measured by `{provenance.get('command')}` on {minute_of(provenance.get('created'))}: "
        f"{machine_text(machine)}; "
        f"driver {machine.get('driver') or 'not known'}, CUDA {machine.get('cuda') or 'none'}"
        + (f"; clocks before: {clocks}." if clocks else ".")
    ]
    peak = mapping(mapping(mapping(parts.get("gpt")).get("about")).get("peak"))
    if peak.get("tflops") is not None:
        lines.append(f"Shares of the peak are of {peak['tflops']:.1f} TFLOP/s: {peak.get('source')}.")
    if peak.get("product_tflops") is not None:
        lines.append(
            f"The best bfloat16 product of size {peak.get('product_size')} measured here: "
            f"{peak['product_tflops']:.1f} TFLOP/s."
        )
    ratio = mapping(mapping(parts.get("offload")).get("about")).get("offloaded_over_resident")
    if isinstance(ratio, float):
        lines.append(f"Model state on the device, offloaded over resident: {ratio:.3f}.")
    commits = {str(mapping(part).get("commit")) for part in parts.values()}
    if len(commits) > 1:
        lines.append(f"Its parts were measured at different commits: {', '.join(sorted(commits))}.")
    return lines


def _table(part: str, rows: Sequence[Mapping[str, Any]]) -> ReportTable:
    """Return the table of one part's rows that did not fail; columns without a value are left out."""
    part_rows = [row for row in rows if row.get("part") == part and not row.get("failure")]
    return table(
        TITLES[part],
        part_rows,
        [
            Column(heading="model", value=entry("model"), form=texts),
            Column(heading="what", value=entry("contender"), form=texts),
            Column(heading="version", value=entry("framework"), form=texts),
            Column(heading="parameters", value=entry("parameters"), form=numbers),
            Column(heading="measured, median batch", value=entry("seconds"), form=seconds),
            Column(heading="per second", value=entry("units_per_s"), form=numbers),
            Column(heading="unit", value=entry("unit"), form=texts),
            Column(heading="TFLOP/s", value=entry("tflops"), form=significant),
            Column(heading="share of the peak", value=entry("pct_peak"), form=percents),
            Column(heading="AxoNN's time over it", value=entry("ratio"), form=ratios),
            Column(heading="largest difference of losses", value=entry("loss_difference"), form=significant),
            Column(heading="model state on the device", value=entry("memory", "after_init"), form=sizes),
            Column(heading="predicted by the memory model", value=entry("model_bytes"), form=sizes),
            Column(heading="error of that", value=entry("model_error_pct"), form=errors),
            Column(heading="peak of the step alone", value=entry("memory", "step_peak"), form=sizes),
            Column(heading="peak of a batch", value=entry("memory", "batch_peak"), form=sizes),
            Column(heading="on the host", value=entry("memory", "host"), form=sizes),
            Column(heading="share hidden", value=_percent, form=percents),
            Column(heading="predicted", value=entry("predicted_s"), form=seconds),
            Column(heading="error of predicted", value=entry("error_pct"), form=errors),
            Column(heading="remark", value=entry("note"), form=texts),
        ],
    )


def _percent(row: Mapping[str, Any]) -> float | None:
    share = row.get("share")
    return 100 * share if isinstance(share, int | float) else None
