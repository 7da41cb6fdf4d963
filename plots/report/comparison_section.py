"""The comparison with other frameworks, as a section of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from plots import figure
from plots.report.evidence import Evidence, minute_of
from plots.report.extras import column_of
from plots.report.figure_sections import machine_text, picture_of
from plots.report.report_tables import (
    Column,
    ReportTable,
    entry,
    fixed,
    numbers,
    ratios,
    seconds,
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
"""Reasons for which a comparison made no more rounds."""


def comparison() -> Evidence:
    """Return the evidence of results/baselines/summary.json; all numbers are measured."""
    command = "make compare-baselines"
    path = figure.RESULTS / "baselines" / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in summary["rows"] if isinstance(row, dict)]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return Evidence(command=command, lacking=[f"No comparison with other frameworks is there; run: {command}"])
    provenance = summary.get("provenance") or {}
    machine = provenance.get("machine") or None
    policy = summary.get("policy") or {}
    notes = list(dict.fromkeys(f"* {r['disclosure']}" for r in rows if r.get("disclosure")))
    return Evidence(
        command=str(provenance.get("command") or command),
        lacking=_lacking(summary, rows),
        remarks=[
            f"Measured by {provenance.get('command')} on {minute_of(provenance.get('created'))}: "
            f"{machine_text(machine or {})}.",
            *(f"{column_of(str(k), [0]).heading}: {v}" for k, v in policy.items()),
            *(str(line) for line in summary.get("remarks") or []),
        ],
        tables=[t for t in (_verdicts(summary), _rows_table(rows, notes)) if t.rows],
        picture=picture_of(
            "baselines",
            "Bars: measured seconds per batch of AxoNN and of other frameworks on the same work, with quartiles, by "
            "workload and kind of parallelism. The table below has the numbers.",
        ),
        machine=machine,
    )


def _lacking(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each thing that is wrong with the comparison, or missing from it."""
    lines = ["The comparison was a quick try, whose times mean nothing."] if summary.get("quick") else []
    lines += ["The comparison was interrupted."] if summary.get("interrupted") else []
    lines += [
        f"{f.get('framework')} {f.get('strategy')}, {f.get('workload')}: {f.get('cause')}: {f.get('detail')}"
        for f in summary.get("failures") or []
        if isinstance(f, dict)
    ]
    lines += [
        f"{row.get('framework')} {row.get('strategy')}, {row.get('workload')}: the machine was busy with other work in "
        "all rounds; when it is idle, measure it again"
        for row in rows
        if row.get("busy") and not row.get("in_ratios", True)
    ]
    absent: dict[str, list[str]] = {}
    for contender in summary.get("not_compared") or []:
        if isinstance(contender, dict):
            name = f"{contender.get('framework')} {contender.get('strategy')}"
            absent.setdefault(str(contender.get("reason")), []).append(name)
    return lines + [f"Not compared: {', '.join(names)}: {reason}" for reason, names in absent.items()]


def _verdicts(summary: Mapping[str, Any]) -> ReportTable:
    verdicts = [v for v in summary.get("verdicts") or [] if isinstance(v, dict)]

    def conclusion(verdict: Mapping[str, Any]) -> str:
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
            Column(heading="workload", value=entry("workload"), form=texts),
            Column(heading="condition", value=entry("condition"), form=texts),
            Column(heading="kind", value=entry("kind"), form=texts),
            Column(heading="AxoNN", value=entry("ours"), form=texts),
            Column(heading="other", value=entry("theirs"), form=texts),
            Column(heading="measured ratio", value=entry("ratio"), form=ratios),
            Column(heading="95% interval", value=lambda v: _ends(v.get("low"), v.get("high")), form=texts),
            Column(heading="measured ratio of processor seconds", value=entry("processor_ratio"), form=ratios),
            Column(
                heading="its 95% interval",
                value=lambda v: _ends(v.get("processor_low"), v.get("processor_high")),
                form=texts,
            ),
            Column(heading="rounds", value=rounds, form=texts),
            Column(heading="verdict", value=conclusion, form=texts),
        ],
    )


def _remark(row: Mapping[str, Any]) -> str | None:
    if row.get("failure"):
        return str(row["failure"].get("cause"))
    return "machine busy" if row.get("busy") else None


def _ends(low: Any, high: Any) -> str | None:
    """Return the two ends of an interval as text."""
    return None if low is None or high is None else f"{fixed(low, 3)} to {fixed(high, 3)}"


def _rows_table(rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> ReportTable:
    measured = table(
        "All that was measured",
        rows,
        [
            Column(heading="workload", value=entry("workload"), form=texts),
            Column(heading="condition", value=entry("condition"), form=texts),
            Column(heading="kind", value=entry("parallelism"), form=texts),
            Column(
                heading="framework",
                value=lambda r: f"{r.get('framework')} {r.get('strategy')}{' *' if r.get('disclosure') else ''}",
                form=texts,
            ),
            Column(heading="ranks", value=entry("ranks"), form=numbers),
            Column(heading="measured, median batch", value=entry("batch_time_s"), form=seconds),
            Column(heading="measured ratio to AxoNN's fastest", value=entry("ratio"), form=ratios),
            Column(heading="95% interval", value=lambda r: _ends(*(r.get("spread") or (None, None))), form=texts),
            Column(heading="measured, processor seconds", value=entry("processor_s"), form=seconds),
            Column(heading="their ratio", value=entry("processor_ratio"), form=ratios),
            Column(
                heading="its 95% interval",
                value=lambda r: _ends(*(r.get("processor_spread") or (None, None))),
                form=texts,
            ),
            Column(heading="tokens/s", value=entry("tokens_per_s"), form=numbers),
            Column(heading="peak memory", value=entry("memory_bytes"), form=sizes),
            Column(heading="sent in a batch", value=entry("bytes_sent"), form=sizes),
            Column(heading="remark", value=_remark, form=texts),
        ],
        notes=notes,
    )
    return replace(measured, folded=True)
