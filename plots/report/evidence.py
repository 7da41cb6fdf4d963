"""What stands beside the figures in the report: the model against published sets, other frameworks, this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import pandas as pd
from pydantic import ValidationError

from axonn.errors import RecordError
from axonn.observability.records import read_records
from experiments import predictor
from experiments.validation.published_sets import FOLDER
from experiments.validation.validation_results import SetResult, Validation, ValidationRow
from experiments.validation.validation_tables import remarks, variant_names
from plots import figure
from plots.report.extras import column_of
from plots.report.figure_sections import Picture, machine_text, picture_of
from plots.report.report_tables import (
    Column,
    ReportTable,
    errors,
    fixed,
    numbers,
    percents,
    ratios,
    seconds,
    significant,
    sizes,
    table,
    texts,
)

STOPPED = {
    "converged": "intervals narrow enough",
    "minutes": "minutes spent",
    "rounds": "as many as were to be",
    "interrupted": "interrupted",
}
"""Why a comparison made no more rounds."""
QUANTITIES = {
    "batch_time_s": "time of a batch, s",
    "pipeline_s": "pipeline phase, s",
    "step_s": "after the pipeline phase, s",
    "all_reduce_s": "all-reduce, s",
    "optimizer_s": "optimizer, s",
    "tflops_per_gpu": "TFLOP/s per GPU",
    "ratio": "ratio",
}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """`lacking`: what is not there, and the way to it."""

    command: str
    lacking: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    tables: list[ReportTable] = field(default_factory=list)
    parts: list[DataSetEvidence] = field(default_factory=list)
    picture: Picture | None = None
    machine: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class DataSetEvidence:
    """One data set."""

    name: str
    title: str
    source: str
    remarks: list[str]
    tables: list[ReportTable]


def _attribute(name: str) -> Any:
    return lambda row: row.get(name)


def when(created: Any) -> str:
    """The day and minute of a record."""
    return str(created)[:16].replace("T", " ") + (" UTC" if str(created).endswith("+00:00") else "")


# The model against published measurements


def published_sets() -> Evidence:
    """Of results/predicted/validation.json."""
    command = "axonn predict --validate"
    path = predictor.PREDICTED / "validation.json"
    if not path.exists():
        return Evidence(
            command=command, lacking=[f"The model has not been held against the published sets; run: {command}"]
        )
    try:
        found = Validation.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        count = error.error_count() if isinstance(error, ValidationError) else 1
        return Evidence(command=command, lacking=[f"{path.name} has another schema ({count} faults); run: {command}"])
    absent = sorted({p.stem for p in FOLDER.glob("*.yaml")} - {result.name for result in found.sets})
    return Evidence(
        command=command,
        lacking=[f"Only some of the sets were predicted; {', '.join(absent)} are missing; run: {command}"]
        if absent
        else [],
        remarks=[f"Computed by {found.command} on {when(found.created)} (commit {found.commit or 'unknown'})."],
        tables=[t for t in (_sets_table(found.sets), _goals_table(found.sets), _fitted_table(found)) if t.rows],
        parts=[
            DataSetEvidence(
                name=result.name,
                title=result.title,
                source=result.source,
                remarks=[line[:1].upper() + line[1:] for line in remarks(result)],
                tables=list(_tables_of_set(result)),
            )
            for result in found.sets
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
            Column(heading="set", value=_attribute("set"), form=texts),
            Column(heading="published points", value=_attribute("points"), form=numbers),
            Column(heading="mean error", value=_attribute("mean"), form=percents),
            Column(heading="largest error", value=_attribute("max"), form=percents),
            Column(heading="mean with sign", value=_attribute("bias"), form=errors),
            Column(heading="rank correlation", value=_attribute("rank"), form=ratios),
            Column(heading="mean error of a constant rate", value=_attribute("constant"), form=percents),
            Column(heading="the same, held out by model", value=_attribute("held"), form=percents),
        ],
        notes=["A constant rate gives every GPU the same TFLOP/s, fitted on the very points of the set."],
    )


def _goals_table(sets: Sequence[SetResult]) -> ReportTable:
    rows = [{"set": r.name, **goal.model_dump()} for r in sets for goal in r.goals]
    return table(
        "Bounds that this project set itself",
        rows,
        [
            Column(heading="set", value=_attribute("set"), form=texts),
            Column(heading="what", value=_attribute("what"), form=texts),
            Column(heading="bound", value=_attribute("bound"), form=percents),
            Column(heading="reached", value=_attribute("reached"), form=percents),
            Column(heading="result", value=lambda row: "met" if row["met"] else "missed", form=texts),
        ],
    )


def _fitted_table(found: Validation) -> ReportTable:
    rows = [fit.model_dump() for fit in found.fitted]
    return table(
        "Fitted constants of the machines, and their errors",
        rows,
        [
            Column(heading="machine", value=_attribute("machine"), form=texts),
            Column(heading="what", value=_attribute("what"), form=texts),
            Column(heading="points", value=_attribute("points"), form=numbers),
            Column(heading="error on these points", value=_attribute("in_sample_error_pct"), form=percents),
            Column(heading="error on points held out", value=_attribute("held_out_error_pct"), form=percents),
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
                Column(heading="point", value=_attribute("label"), form=texts),
                Column(heading="published", value=_attribute("measured"), form=numbers),
                Column(heading="predicted", value=_attribute("predicted"), form=numbers),
                Column(heading="error", value=_attribute("error_pct"), form=errors),
                Column(heading="predicted by a constant rate", value=_attribute("constant"), form=numbers),
                Column(heading="its error", value=_attribute("constant_error_pct"), form=errors),
                Column(heading="remark", value=lambda r: None if r["fits"] else "does not fit in memory", form=texts),
            ],
        )
    if result.variants:
        yield _variants(result)


def _variants(result: SetResult) -> ReportTable:
    """A column for each assumption; the notes say what it is."""
    named = variant_names(result)
    rows = [
        {"what": name} | {letter: v.predicted.get(name) for (letter, _), v in zip(named, result.variants, strict=True)}
        for name in dict.fromkeys(name for variant in result.variants for name in variant.predicted)
    ]
    found = table(
        f"{result.name}: predicted with other assumptions",
        rows,
        [
            Column(heading="what", value=_attribute("what"), form=texts),
            *(Column(heading=letter, value=_attribute(letter), form=significant) for letter, _ in named),
        ],
        notes=[
            f"{letter}: {meaning}" + ("" if v.mean_pct is None else f"; mean error {fixed(v.mean_pct, 1)}%")
            for (letter, meaning), v in zip(named[1:], result.variants[1:], strict=True)
        ],
    )
    return ReportTable(**{**vars(found), "folded": True})


# Other frameworks


def comparison() -> Evidence:
    """Of results/baselines/summary.json; all numbers are measured."""
    command = "make compare-baselines"
    path = figure.RESULTS / "baselines" / "summary.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in found["rows"] if isinstance(row, dict)]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return Evidence(command=command, lacking=[f"No comparison with other frameworks is there; run: {command}"])
    lacking = ["The comparison was a quick try, whose times mean nothing."] if found.get("quick") else []
    lacking += ["The comparison was interrupted."] if found.get("interrupted") else []
    failures = [f for f in found.get("failures") or [] if isinstance(f, dict)]
    lacking += [
        f"{f.get('framework')} {f.get('strategy')}, {f.get('workload')}: {f.get('cause')}: {f.get('detail')}"
        for f in failures
    ]
    lacking += [
        f"{row.get('framework')} {row.get('strategy')}, {row.get('workload')}: the machine was busy with other work in "
        "all rounds; when it is idle, measure it again"
        for row in rows
        if row.get("busy") and not row.get("in_ratios", True)
    ]
    absent: dict[str, list[str]] = {}
    for one in found.get("not_compared") or []:
        if isinstance(one, dict):
            absent.setdefault(str(one.get("reason")), []).append(f"{one.get('framework')} {one.get('strategy')}")
    lacking += [f"Not compared: {', '.join(names)}: {reason}" for reason, names in absent.items()]
    provenance = found.get("provenance") or {}
    machine = provenance.get("machine") or None
    said = [
        f"Measured by {provenance.get('command')} on {when(provenance.get('created'))}: {machine_text(machine or {})}."
    ]
    policy = found.get("policy") or {}
    notes = list(dict.fromkeys(f"* {r['disclosure']}" for r in rows if r.get("disclosure")))
    return Evidence(
        command=str(provenance.get("command") or command),
        lacking=lacking,
        remarks=[
            *said,
            *(f"{column_of(str(k), [0]).heading}: {v}" for k, v in policy.items()),
            *(str(line) for line in found.get("remarks") or []),
        ],
        tables=[t for t in (_verdicts(found), _baseline_rows(rows, notes)) if t.rows],
        picture=picture_of(
            "baselines",
            "Bars: measured seconds per batch of AxoNN and of other frameworks on the same work, with quartiles, by "
            "workload and kind of parallelism. The table below has the numbers.",
        ),
        machine=machine,
    )


def _verdicts(found: Mapping[str, Any]) -> ReportTable:
    verdicts = [v for v in found.get("verdicts") or [] if isinstance(v, dict)]

    def said(verdict: Mapping[str, Any]) -> str:
        if verdict.get("reason"):
            return str(verdict["reason"])
        return "AxoNN is behind" if verdict.get("behind") else "AxoNN is not behind"

    def rounds(verdict: Mapping[str, Any]) -> str | None:
        if verdict.get("stopped") is None:
            return None
        left_out = f", {verdict['busy_rounds']} left out (machine busy)" if verdict.get("busy_rounds") else ""
        return f"{verdict.get('rounds')}{left_out}: {STOPPED.get(verdict['stopped'], verdict['stopped'])}"

    return table(
        "AxoNN's fastest over the fastest other framework of the kind: measured ratios of seconds per batch",
        verdicts,
        [
            Column(heading="workload", value=_attribute("workload"), form=texts),
            Column(heading="condition", value=_attribute("condition"), form=texts),
            Column(heading="kind", value=_attribute("kind"), form=texts),
            Column(heading="AxoNN", value=_attribute("ours"), form=texts),
            Column(heading="other", value=_attribute("theirs"), form=texts),
            Column(heading="measured ratio", value=_attribute("ratio"), form=ratios),
            Column(heading="95% interval", value=lambda v: _ends(v.get("low"), v.get("high")), form=texts),
            Column(heading="measured ratio of processor seconds", value=_attribute("processor_ratio"), form=ratios),
            Column(
                heading="its 95% interval",
                value=lambda v: _ends(v.get("processor_low"), v.get("processor_high")),
                form=texts,
            ),
            Column(heading="rounds", value=rounds, form=texts),
            Column(heading="verdict", value=said, form=texts),
        ],
    )


def _remark(row: Mapping[str, Any]) -> str | None:
    if row.get("failure"):
        return str(row["failure"].get("cause"))
    return "machine busy" if row.get("busy") else None


def _ends(low: Any, high: Any) -> str | None:
    """An interval in words."""
    return None if low is None or high is None else f"{fixed(low, 3)} to {fixed(high, 3)}"


def _baseline_rows(rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> ReportTable:
    found = table(
        "All that was measured",
        rows,
        [
            Column(heading="workload", value=_attribute("workload"), form=texts),
            Column(heading="condition", value=_attribute("condition"), form=texts),
            Column(heading="kind", value=_attribute("parallelism"), form=texts),
            Column(
                heading="framework",
                value=lambda r: f"{r.get('framework')} {r.get('strategy')}{' *' if r.get('disclosure') else ''}",
                form=texts,
            ),
            Column(heading="ranks", value=_attribute("ranks"), form=numbers),
            Column(heading="measured, median batch", value=_attribute("batch_time_s"), form=seconds),
            Column(heading="measured ratio to AxoNN's fastest", value=_attribute("ratio"), form=ratios),
            Column(heading="95% interval", value=lambda r: _ends(*(r.get("spread") or (None, None))), form=texts),
            Column(heading="measured, processor seconds", value=_attribute("processor_s"), form=seconds),
            Column(heading="their ratio", value=_attribute("processor_ratio"), form=ratios),
            Column(
                heading="its 95% interval",
                value=lambda r: _ends(*(r.get("processor_spread") or (None, None))),
                form=texts,
            ),
            Column(heading="tokens/s", value=_attribute("tokens_per_s"), form=numbers),
            Column(heading="peak memory", value=_attribute("memory_bytes"), form=sizes),
            Column(heading="sent in a batch", value=_attribute("bytes_sent"), form=sizes),
            Column(heading="remark", value=_remark, form=texts),
        ],
        notes=notes,
    )
    return ReportTable(**{**vars(found), "folded": True})


# This machine


def this_machine_runs() -> Evidence:
    """Of results/local/validation.json: predicted and measured batch times of the same runs."""
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
    measured = {r.point: r for r in records if r.kind == "measured" and r.batch_time_s is not None}
    predicted = {r.point: r for r in records if r.kind == "predicted" and r.batch_time_s is not None}
    rows: list[dict[str, Any]] = []
    for name, record in measured.items():
        if name not in predicted or not record.batch_time_s:
            continue
        guess = predicted[name].batch_time_s or 0.0
        error = 100 * (guess / record.batch_time_s - 1)
        rows.append(
            {
                "run": name,
                "ranks": record.asked.gpus,
                "measured": record.batch_time_s,
                "predicted": guess,
                "error": error,
            }
        )
    if not rows:
        return Evidence(
            command=command, lacking=[f"{path.name} has no pair of a measured and a predicted run; run: {command}"]
        )
    sizes_of = [abs(row["error"]) for row in rows]
    ranks = pd.DataFrame(rows)[["measured", "predicted"]].rank()
    correlation = f", rank correlation {ranks['measured'].corr(ranks['predicted']):.3f}" if len(rows) > 2 else ""
    first = next(iter(measured.values()))
    machine = first.machine.model_dump(exclude_none=True)
    return Evidence(
        command=command,
        remarks=[
            f"{len(rows)} runs: mean error {fixed(mean(sizes_of), 1)}%, "
            f"largest {fixed(max(sizes_of), 1)}%{correlation}.",
            f"Measured and computed by {first.source} on {when(first.created)}: {machine_text(machine)}.",
        ],
        tables=[
            table(
                "A batch on this machine",
                rows,
                [
                    Column(heading="run", value=_attribute("run"), form=texts),
                    Column(heading="ranks", value=_attribute("ranks"), form=numbers),
                    Column(heading="measured", value=_attribute("measured"), form=seconds),
                    Column(heading="predicted", value=_attribute("predicted"), form=seconds),
                    Column(heading="error of predicted", value=_attribute("error"), form=errors),
                ],
            )
        ],
        machine=machine,
    )
