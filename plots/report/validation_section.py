"""The model against measurements, as sections of the report: published data sets, and runs on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import pandas as pd
from pydantic import ValidationError

from axonn.errors import RecordError
from axonn.observability.records import Record, RecordKind, read_records
from experiments import predictor
from experiments.validation.published_sets import FOLDER
from experiments.validation.validation_results import SetResult, Validation, ValidationRow
from experiments.validation.validation_tables import remarks, variant_names
from plots import figure
from plots.report.evidence import DataSetEvidence, Evidence, minute_of
from plots.report.figure_sections import machine_text
from plots.report.report_tables import (
    Column,
    ReportTable,
    entry,
    errors,
    fixed,
    numbers,
    percents,
    ratios,
    seconds,
    significant,
    table,
    texts,
)

QUANTITIES = {
    "batch_time_s": "time of a batch, s",
    "pipeline_s": "pipeline phase, s",
    "step_s": "after the pipeline phase, s",
    "all_reduce_s": "all-reduce, s",
    "optimizer_s": "optimizer, s",
    "tflops_per_gpu": "TFLOP/s per GPU",
    "model_tflops_per_gpu": "model TFLOP/s per GPU",
    "samples_per_s": "samples per second",
    "ratio": "ratio",
}
"""Names of the quantities in captions."""


def published_sets() -> Evidence:
    """Return the evidence of results/predicted/validation.json: predictions beside published data sets."""
    command = "axonn predict --validate"
    path = predictor.PREDICTED / "validation.json"
    if not path.exists():
        return Evidence(
            command=command, lacking=[f"The model has not been held against the published sets; run: {command}"]
        )
    try:
        validation = Validation.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        count = error.error_count() if isinstance(error, ValidationError) else 1
        return Evidence(command=command, lacking=[f"{path.name} has another schema ({count} faults); run: {command}"])
    absent = sorted({p.stem for p in FOLDER.glob("*.yaml")} - {result.name for result in validation.sets})
    return Evidence(
        command=command,
        lacking=[f"Only some of the sets were predicted; {', '.join(absent)} are missing; run: {command}"]
        if absent
        else [],
        remarks=[
            f"Computed by {validation.command} on {minute_of(validation.created)} "
            f"(commit {validation.commit or 'unknown'})."
        ],
        tables=[
            t
            for t in (_sets_table(validation.sets), _goals_table(validation.sets), _fitted_table(validation))
            if t.rows
        ],
        parts=[
            DataSetEvidence(
                name=result.name,
                title=result.title,
                source=result.source,
                remarks=[line[:1].upper() + line[1:] for line in remarks(result)],
                tables=list(_tables_of_set(result)),
            )
            for result in validation.sets
        ],
    )


def _sets_table(sets: Sequence[SetResult]) -> ReportTable:
    rows = [
        {
            "set": r.name,
            "points": len(r.rows or r.ratios),
            "mean": r.mean_pct,
            "max": r.max_pct,
            "bias": r.bias_pct,
            "rank": r.rank_correlation,
            "constant": r.constant_mean_pct,
            "held": r.constant_held_out_pct,
        }
        for r in sets
    ]
    return table(
        "All sets: errors of the predicted values",
        rows,
        [
            Column(heading="set", value=entry("set"), form=texts),
            Column(heading="published points", value=entry("points"), form=numbers),
            Column(heading="mean error", value=entry("mean"), form=percents),
            Column(heading="largest error", value=entry("max"), form=percents),
            Column(heading="mean with sign", value=entry("bias"), form=errors),
            Column(heading="rank correlation", value=entry("rank"), form=ratios),
            Column(heading="mean error of a constant rate", value=entry("constant"), form=percents),
            Column(heading="the same, held out by model", value=entry("held"), form=percents),
        ],
        notes=["A constant rate gives every GPU the same TFLOP/s, fitted on the very points of the set."],
    )


def _goals_table(sets: Sequence[SetResult]) -> ReportTable:
    rows = [{"set": r.name, **goal.model_dump()} for r in sets for goal in r.goals]
    return table(
        "Bounds that this project set itself",
        rows,
        [
            Column(heading="set", value=entry("set"), form=texts),
            Column(heading="what", value=entry("what"), form=texts),
            Column(heading="bound", value=entry("bound"), form=percents),
            Column(heading="reached", value=entry("reached"), form=percents),
            Column(heading="result", value=lambda row: "met" if row["met"] else "missed", form=texts),
        ],
    )


def _fitted_table(validation: Validation) -> ReportTable:
    rows = [fit.model_dump() for fit in validation.fitted]
    return table(
        "Fitted constants of the machines, and their errors",
        rows,
        [
            Column(heading="machine", value=entry("machine"), form=texts),
            Column(heading="what", value=entry("what"), form=texts),
            Column(heading="points", value=entry("points"), form=numbers),
            Column(heading="error on these points", value=entry("in_sample_error_pct"), form=percents),
            Column(heading="error on points held out", value=entry("held_out_error_pct"), form=percents),
        ],
    )


def _tables_of_set(result: SetResult) -> Iterator[ReportTable]:
    by_quantity: dict[str, list[ValidationRow]] = {}
    for row in [*result.rows, *result.ratios]:
        by_quantity.setdefault(row.quantity, []).append(row)
    for quantity, rows in by_quantity.items():
        plain = [r.model_dump() for r in rows]
        yield table(
            f"{result.name}: {QUANTITIES.get(quantity, quantity)}",
            plain,
            [
                Column(heading="point", value=entry("label"), form=texts),
                Column(heading="published", value=entry("measured"), form=numbers),
                Column(heading="predicted", value=entry("predicted"), form=numbers),
                Column(heading="error", value=entry("error_pct"), form=errors),
                Column(heading="predicted by a constant rate", value=entry("constant"), form=numbers),
                Column(heading="its error", value=entry("constant_error_pct"), form=errors),
                Column(heading="remark", value=lambda r: None if r["fits"] else "does not fit in memory", form=texts),
            ],
        )
    if result.variants:
        yield _variants(result)


def _variants(result: SetResult) -> ReportTable:
    """Return the table with a column for each assumption, which the notes explain."""
    named = variant_names(result)
    rows = [
        {"what": name} | {letter: v.predicted.get(name) for (letter, _), v in zip(named, result.variants, strict=True)}
        for name in dict.fromkeys(name for variant in result.variants for name in variant.predicted)
    ]
    variants = table(
        f"{result.name}: predicted with other assumptions",
        rows,
        [
            Column(heading="what", value=entry("what"), form=texts),
            *(Column(heading=letter, value=entry(letter), form=significant) for letter, _ in named),
        ],
        notes=[
            f"{letter}: {meaning}" + ("" if v.mean_pct is None else f"; mean error {fixed(v.mean_pct, 1)}%")
            for (letter, meaning), v in zip(named[1:], result.variants[1:], strict=True)
        ],
    )
    return replace(variants, folded=True)


def this_machine_runs() -> Evidence:
    """Return the evidence of results/local/validation.json: predicted and measured batch times of the same runs."""
    command = "make validate-local"
    path = figure.RESULTS / "local" / "validation.json"
    if not path.exists():
        return Evidence(
            command=command, lacking=[f"The model has not been held against runs on this machine; run: {command}"]
        )
    try:
        records = read_records(path)
    except RecordError as error:
        return Evidence(command=command, lacking=[f"{path.name}: {error.__class__.__name__}; run: {command}"])
    measured = _by_point(records, "measured")
    rows = _local_rows(measured, _by_point(records, "predicted"))
    if not rows:
        return Evidence(
            command=command, lacking=[f"{path.name} has no pair of a measured and a predicted run; run: {command}"]
        )
    first = next(iter(measured.values()))
    machine = first.machine.model_dump(exclude_none=True)
    return Evidence(
        command=command,
        remarks=[
            _local_errors(rows),
            f"Measured and computed by {first.source} on {minute_of(first.created)}: {machine_text(machine)}.",
        ],
        tables=[
            table(
                "A batch on this machine",
                rows,
                [
                    Column(heading="run", value=entry("run"), form=texts),
                    Column(heading="ranks", value=entry("ranks"), form=numbers),
                    Column(heading="measured", value=entry("measured"), form=seconds),
                    Column(heading="predicted", value=entry("predicted"), form=seconds),
                    Column(heading="error of predicted", value=entry("error"), form=errors),
                ],
            )
        ],
        machine=machine,
    )


def _by_point(records: Sequence[Record], kind: RecordKind) -> dict[str, Record]:
    return {r.point: r for r in records if r.kind == kind and r.batch_time_s is not None}


def _local_rows(measured: Mapping[str, Record], predicted: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Return a row for each run that is both measured and predicted."""
    rows = []
    for name, record in measured.items():
        if name in predicted and record.batch_time_s:
            predicted_s = predicted[name].batch_time_s or 0.0
            rows.append(
                {
                    "run": name,
                    "ranks": record.asked.gpus,
                    "measured": record.batch_time_s,
                    "predicted": predicted_s,
                    "error": 100 * (predicted_s / record.batch_time_s - 1),
                }
            )
    return rows


def _local_errors(rows: Sequence[Mapping[str, Any]]) -> str:
    """Summarise the errors of the predicted runs."""
    sizes = [abs(row["error"]) for row in rows]
    ranks = pd.DataFrame(rows)[["measured", "predicted"]].rank()
    correlation = f", rank correlation {ranks['measured'].corr(ranks['predicted']):.3f}" if len(rows) > 2 else ""
    return f"{len(rows)} runs: mean error {fixed(mean(sizes), 1)}%, largest {fixed(max(sizes), 1)}%{correlation}."
