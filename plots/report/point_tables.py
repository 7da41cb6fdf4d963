"""Tables of a figure's points: published, predicted and measured side by side, each under its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from plots.report.extras import rendered
from plots.report.report_tables import (
    TIMES,
    Column,
    ReportTable,
    entry,
    errors,
    grid_text,
    is_number,
    mapping,
    numbers,
    percents,
    plain_seconds,
    ratios,
    seconds_like,
    sizes,
    table,
    texts,
    words,
)
from plots.summary import compared as in_ratios
from plots.summary import here, machine_of

KINDS = ("published", "predicted", "measured")
KNOWN = {
    "figure", "title", "about", "differs", "rows", "mape_pct", "missing", "failures", "policy", "provenance",
    "fingerprint", "sha256", "busy", "busy_in_ratios", "not_known_whether_busy", "not_installed",
}  # fmt: skip
"""Entries that every summary has; others are the figure's own."""
GRID_HEADING = f"grid, data {TIMES} inter {TIMES} row {TIMES} col"
ALL_AXES = {"data+inter+row+col": "all axes"}
WOVEN_IN = {"naive", "wrong_orders"}
"""Extras that have a place of their own."""


def _share_of_others(row: Mapping[str, Any]) -> str | None:
    share = row.get("others_share")
    return f"busy: others took {share:.0%} of the cores" if row.get("busy") and is_number(share) else None


def _others_pct(row: Mapping[str, Any]) -> float | None:
    share = row.get("others_share")
    return 100 * share if is_number(share) else None


_MACHINE_BUSY = Column(heading="the machine while measuring", value=_share_of_others, form=texts)


def _who(rows: Sequence[Mapping[str, Any]], *, gpus: str = "GPUs") -> list[Column]:
    """Return the columns that identify a row: the point only where framework, model and GPUs do not suffice."""
    columns = [
        Column(heading="framework", value=entry("framework"), form=texts),
        Column(heading="model", value=entry("model"), form=texts),
        Column(heading=gpus, value=entry("gpus"), form=numbers),
    ]
    named = {(r.get("framework"), r.get("model"), r.get("gpus")) for r in rows}
    points = {(r.get("framework"), r.get("point")) for r in rows}
    if len(points) > len(named):
        columns.insert(0, Column(heading="point", value=entry("point"), form=texts))
    return columns


def tables_of(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[ReportTable]:
    """Yield all tables of a figure: published scale, this machine, the figure's own, and details of every point."""
    local = [r for r in rows if here(r)]
    local_points = {_key(r) for r in local}
    at_scale = [r for r in rows if r not in local and not (_key(r) in local_points and r.get("kind") == "predicted")]
    elsewhere = _elsewhere(rows)
    if len(elsewhere) > 1 or any(_small(rows, r) for machine_rows in elsewhere.values() for r in machine_rows):
        # Several machines, or points other than the published: each machine has a table of its own.
        at_scale = [r for r in at_scale if r.get("kind") != "measured"]
    else:
        elsewhere = {}
    local_predictions = {_key(r): r for r in rows if r.get("kind") == "predicted" and _key(r) in local_points}
    if at_scale:
        yield _scale_table(at_scale, mapping(summary.get("naive")))
        yield from _phases_table(at_scale)
    if local:
        yield _machine_table(local, local_predictions)
    for title, machine_rows in elsewhere.items():
        yield _machine_table(machine_rows, {}, title=title)
    for key, value in summary.items():
        if key not in KNOWN and key not in WOVEN_IN:
            yield from rendered(str(key), value)
    yield from _details(rows, parts="parts" not in summary)


def _small(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> bool:
    """Return whether a measured row is of none of the published or predicted points."""
    return all(_key(point) != _key(row) for point in rows if point.get("kind") != "measured")


def _elsewhere(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the rows measured on other machines, by the title of their table: machine, and batch of small points."""
    by_title: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("kind") == "measured" and not here(row):
            batch = f", batch {row.get('batch_size')}" if _small(rows, row) and row.get("batch_size") else ""
            scale = "" if _small(rows, row) else ", at the published scale"
            by_title.setdefault(f"Measured on {machine_of(row)}{scale}{batch}: time of a batch", []).append(row)
    return by_title


def _key(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row.get("point"), row.get("framework")


def _merged(rows: Sequence[Mapping[str, Any]], value: str) -> list[dict[str, Any]]:
    """Return one row per point and framework, with `value` and the error of each kind."""
    merged: dict[tuple[Any, Any], dict[str, Any]] = {}
    for row in rows:
        point = merged.setdefault(_key(row), {k: row.get(k) for k in ("point", "framework", "model", "gpus")})
        kind = row.get("kind")
        if row.get("busy"):
            point |= {"busy": True, "others_share": row.get("others_share")}
        point[f"{kind}"] = row.get(value)
        point[f"{kind} error"] = row.get("error_pct")
    return list(merged.values())


def _compared(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return the columns published, predicted, error, measured and error, each under the name of its kind."""
    several = any(is_number(r.get("measured error")) for r in rows)
    form = seconds_like(r.get(kind) for r in rows for kind in KINDS)
    return [
        Column(heading="published", value=entry("published"), form=form),
        Column(heading="predicted", value=entry("predicted"), form=form),
        Column(heading="error of predicted" if several else "error", value=entry("predicted error"), form=errors),
        Column(heading="measured", value=entry("measured"), form=form),
        Column(heading="error of measured", value=entry("measured error"), form=errors),
    ]


def _scale_table(rows: Sequence[Mapping[str, Any]], naive: Mapping[str, Any]) -> ReportTable:
    merged = _merged(rows, "batch_time_s")
    constant = {
        (r.get("framework"), r.get("model"), r.get("gpus")): r for r in naive.get("rows") or [] if isinstance(r, dict)
    }
    for row in merged:
        flat = constant.get((row["framework"], row["model"], row["gpus"]), {})
        row |= {"constant": flat.get("batch_time_s"), "constant error": flat.get("error_pct")}
    machines = ", ".join(
        dict.fromkeys(str(r["machine"]).capitalize() for r in rows if isinstance(r.get("machine"), str))
    )
    measured = dict.fromkeys(machine_of(r) for r in rows if r.get("kind") == "measured" and r.get("machine"))
    notes = (
        [] if any(is_number(r.get("published")) for r in merged) else ["No batch time is published for these points."]
    )
    notes += [f"Measured on {name}." for name in measured]
    return table(
        f"At the published scale ({machines}): time of a batch" if machines else "Time of a batch",
        merged,
        [
            *_who(merged),
            *_compared(merged),
            Column(heading="predicted by a constant rate", value=entry("constant"), form=plain_seconds),
            Column(heading="its error", value=entry("constant error"), form=errors),
            _MACHINE_BUSY,
        ],
        notes=notes,
    )


def _phases_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[ReportTable]:
    """Yield the phases beside each other, where some are published."""
    if not any(r.get("kind") == "published" and mapping(r.get("phases_s")) for r in rows):
        return
    merged = []
    for row in _merged(rows, "phases_s"):
        named = {k: row.get(k) for k in ("point", "framework", "model", "gpus", "busy", "others_share")}
        kinds = {kind: mapping(row.get(kind)) for kind in KINDS}
        for phase in dict.fromkeys(p for phases in kinds.values() for p in phases):
            phase_row = named | {"phase": words(phase)} | {kind: phases.get(phase) for kind, phases in kinds.items()}
            published = phase_row["published"]
            if published is None and phase_row["measured"] is None:
                continue
            for kind in ("predicted", "measured"):
                phase_row[f"{kind} error"] = _error(phase_row[kind], published)
            merged.append(phase_row)
    who = _who(merged)
    who.append(Column(heading="phase", value=entry("phase"), form=texts))
    yield table("Phases of a batch", merged, [*who, *_compared(merged), _MACHINE_BUSY])


def _error(value: Any, reference: Any) -> float | None:
    """Return the relative difference in percent; None where one of the two is missing."""
    return 100 * (value / reference - 1) if is_number(value) and is_number(reference) and reference else None


def _machine_table(
    rows: Sequence[Mapping[str, Any]],
    predicted: Mapping[tuple[Any, Any], Mapping[str, Any]],
    *,
    title: str = "Measured on the machine at hand: time of a batch",
) -> ReportTable:
    """Return the table of one machine; ratios are to our engine on the same model and ranks."""
    rows = sorted(rows, key=lambda r: (str(type(r.get("gpus"))), r.get("gpus") or 0))
    ours = {(r.get("model"), r.get("gpus")): r for r in rows if r.get("framework") == "AxoNN"}
    compared = len({r.get("framework") for r in rows}) > 1
    # Where our engine has several configurations, there is no single one to take the ratio to.
    compared = compared and len(ours) == sum(r.get("framework") == "AxoNN" for r in rows)

    def ratio(row: Mapping[str, Any]) -> float | None:
        our_row = ours.get((row.get("model"), row.get("gpus")))
        if not compared or not in_ratios(row, our_row):
            return None
        time, reference = row.get("batch_time_s"), mapping(our_row).get("batch_time_s")
        return time / reference if is_number(time) and is_number(reference) and reference else None

    def repeats(row: Mapping[str, Any], which: Callable[[list[float]], float]) -> float | None:
        times = [t for t in row.get("repeats_s") or [] if is_number(t)]
        return which(times) if len(times) > 1 else None

    def gflops(row: Mapping[str, Any]) -> float | None:
        rate = row.get("tflops_per_gpu")
        return 1e3 * rate if is_number(rate) and rate else None

    def expected(row: Mapping[str, Any]) -> Any:
        return predicted.get(_key(row), {}).get("batch_time_s")

    def error(row: Mapping[str, Any]) -> float | None:
        return _error(expected(row), row.get("batch_time_s") if in_ratios(row) else None)

    form = seconds_like(t for r in rows for t in (r.get("batch_time_s"), repeats(r, max), expected(r)))
    return table(
        title,
        rows,
        [
            *_who(rows, gpus="ranks"),
            Column(heading=GRID_HEADING, value=lambda r: grid_text(r.get("grid")), form=texts),
            Column(heading="measured, median", value=entry("batch_time_s"), form=form),
            Column(heading="least", value=lambda r: repeats(r, min), form=form),
            Column(heading="most", value=lambda r: repeats(r, max), form=form),
            Column(heading="measured, ratio to AxoNN", value=ratio, form=ratios),
            Column(heading="predicted", value=expected, form=form),
            Column(heading="error of predicted", value=error, form=errors),
            Column(heading="measured, GFLOP/s per rank", value=gflops, form=numbers),
            Column(heading="measured, loss at the end", value=entry("final_loss"), form=numbers),
            Column(heading="measured, processor seconds", value=entry("processor_s"), form=plain_seconds),
            _MACHINE_BUSY,
        ],
    )


def _details(rows: Sequence[Mapping[str, Any]], *, parts: bool) -> Iterator[ReportTable]:
    """Yield parts (if wanted), memory and bytes of every point, folded."""
    with_parts = [r for r in rows if parts and mapping(r.get("parts_s"))]
    who = [*_who(rows, gpus="GPUs or ranks"), Column(heading="kind", value=entry("kind"), form=texts)]
    if with_parts:
        names = dict.fromkeys(name for r in with_parts for name in r["parts_s"])
        columns = [Column(heading=words(name), value=entry("parts_s", name), form=plain_seconds) for name in names]
        caption = "Where the time of a batch goes, by spans, mean of the ranks"
        yield replace(table(caption, with_parts, [*who, *columns, _MACHINE_BUSY]), folded=True)
    axes = list(dict.fromkeys(a for r in rows for a in mapping(r.get("bytes_per_batch"))))
    columns = [
        Column(heading=GRID_HEADING, value=lambda r: grid_text(r.get("grid")), form=texts),
        Column(heading="microbatch", value=entry("microbatch_size"), form=numbers),
        Column(heading="peak memory", value=entry("memory_bytes"), form=sizes),
        Column(heading="processor seconds", value=entry("processor_s"), form=plain_seconds),
        Column(heading="load", value=entry("load"), form=numbers),
        Column(heading="cores taken by others", value=_others_pct, form=percents),
        _MACHINE_BUSY,
        *(
            Column(heading=f"sent along {ALL_AXES.get(axis, axis)}", value=entry("bytes_per_batch", axis), form=sizes)
            for axis in axes
        ),
    ]
    if rows:
        caption = "Configuration, memory of the fullest rank, and bytes that a rank sends for a batch"
        yield replace(table(caption, rows, [*who, *columns]), folded=True)
