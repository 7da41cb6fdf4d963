"""Tables of a figure's points: published, predicted and measured side by side, each under its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from plots.report.extras import rendered
from plots.report.report_tables import (
    TIMES,
    Column,
    ReportTable,
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
"""What every summary has; the rest is of the figure's own."""
GRID_HEADING = f"grid, data {TIMES} inter {TIMES} row {TIMES} col"
ALL_AXES = {"data+inter+row+col": "all axes"}
WOVEN_IN = {"naive", "wrong_orders"}
"""Extras with a place of their own."""


def _get(key: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda row: row.get(key)


def _share_of_others(row: Mapping[str, Any]) -> str | None:
    share = row.get("others_share")
    return f"busy: others took {share:.0%} of the cores" if row.get("busy") and is_number(share) else None


def _others_pct(row: Mapping[str, Any]) -> float | None:
    share = row.get("others_share")
    return 100 * share if is_number(share) else None


_MACHINE_BUSY = Column(heading="the machine while measuring", value=_share_of_others, form=texts)


def _who(rows: Sequence[Mapping[str, Any]], *, gpus: str = "GPUs") -> list[Column]:
    """What names a row: the point only where framework, model and GPUs do not."""
    columns = [
        Column(heading="framework", value=_get("framework"), form=texts),
        Column(heading="model", value=_get("model"), form=texts),
        Column(heading=gpus, value=_get("gpus"), form=numbers),
    ]
    named = {(r.get("framework"), r.get("model"), r.get("gpus")) for r in rows}
    points = {(r.get("framework"), r.get("point")) for r in rows}
    if len(points) > len(named):
        columns.insert(0, Column(heading="point", value=_get("point"), form=texts))
    return columns


def tables_of(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[ReportTable]:
    """All tables of a figure: at the published scale, on this machine, of its own, and the details of every point."""
    mine = [r for r in rows if here(r)]
    local = {(r.get("point"), r.get("framework")) for r in mine}
    at_scale = [r for r in rows if r not in mine and not (_key(r) in local and r.get("kind") == "predicted")]
    elsewhere = _elsewhere(rows)
    if len(elsewhere) > 1 or any(_small(rows, r) for own in elsewhere.values() for r in own):
        # Of several machines, or of other points than the published: each has a table of its own.
        at_scale = [r for r in at_scale if r.get("kind") != "measured"]
    else:
        elsewhere = {}
    beside = [r for r in rows if r.get("kind") == "predicted" and _key(r) in local]
    if at_scale:
        yield _scale_table(at_scale, mapping(summary.get("naive")))
        yield from _phases_table(at_scale)
    if mine:
        yield _here_table(mine, {_key(r): r for r in beside})
    for title, own in elsewhere.items():
        yield _here_table(own, {}, title=title)
    for key, value in summary.items():
        if key not in KNOWN and key not in WOVEN_IN:
            yield from rendered(str(key), value)
    yield from _details(rows, parts="parts" not in summary)


def _small(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> bool:
    """Whether a measured row is of none of the published or predicted points."""
    return all(_key(other) != _key(row) for other in rows if other.get("kind") != "measured")


def _elsewhere(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """What was measured on other machines, by the title of its table: machine, and batch of what is small."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("kind") == "measured" and not here(row):
            batch = f", batch {row.get('batch_size')}" if _small(rows, row) and row.get("batch_size") else ""
            scale = "" if _small(rows, row) else ", at the published scale"
            found.setdefault(f"Measured on {machine_of(row)}{scale}{batch}: time of a batch", []).append(row)
    return found


def _key(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row.get("point"), row.get("framework")


def _merged(rows: Sequence[Mapping[str, Any]], value: str) -> list[dict[str, Any]]:
    """One row per point and framework, with `value` and the error of each kind."""
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    for row in rows:
        mine = found.setdefault(_key(row), {k: row.get(k) for k in ("point", "framework", "model", "gpus")})
        kind = row.get("kind")
        if row.get("busy"):
            mine |= {"busy": True, "others_share": row.get("others_share")}
        mine[f"{kind}"] = row.get(value)
        mine[f"{kind} error"] = row.get("error_pct")
    return list(found.values())


def _compared(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Published, predicted, error, measured, error: each under the name of its kind."""
    several = any(is_number(r.get("measured error")) for r in rows)
    form = seconds_like(r.get(kind) for r in rows for kind in KINDS)
    return [
        Column(heading="published", value=_get("published"), form=form),
        Column(heading="predicted", value=_get("predicted"), form=form),
        Column(heading="error of predicted" if several else "error", value=_get("predicted error"), form=errors),
        Column(heading="measured", value=_get("measured"), form=form),
        Column(heading="error of measured", value=_get("measured error"), form=errors),
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
            Column(heading="predicted by a constant rate", value=_get("constant"), form=plain_seconds),
            Column(heading="its error", value=_get("constant error"), form=errors),
            _MACHINE_BUSY,
        ],
        notes=notes,
    )


def _phases_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[ReportTable]:
    """Where phases are published."""
    if not any(r.get("kind") == "published" and mapping(r.get("phases_s")) for r in rows):
        return
    merged = []
    for row in _merged(rows, "phases_s"):
        named = {k: row.get(k) for k in ("point", "framework", "model", "gpus", "busy", "others_share")}
        kinds = {kind: mapping(row.get(kind)) for kind in KINDS}
        for phase in dict.fromkeys(p for of in kinds.values() for p in of):
            one = named | {"phase": words(phase)} | {kind: of.get(phase) for kind, of in kinds.items()}
            if one["published"] is None and one["measured"] is None:
                continue
            for kind in ("predicted", "measured"):
                ratio = (one[kind], one["published"])
                one[f"{kind} error"] = (
                    100 * (ratio[0] / ratio[1] - 1) if all(map(is_number, ratio)) and ratio[1] else None
                )
            merged.append(one)
    who = _who(merged)
    who.append(Column(heading="phase", value=_get("phase"), form=texts))
    yield table("Phases of a batch", merged, [*who, *_compared(merged), _MACHINE_BUSY])


def _here_table(
    rows: Sequence[Mapping[str, Any]],
    predicted: Mapping[tuple[Any, Any], Mapping[str, Any]],
    *,
    title: str = "Measured on the machine at hand: time of a batch",
) -> ReportTable:
    """Measured on one machine; ratios to our engine on the same model and ranks."""
    rows = sorted(rows, key=lambda r: (str(type(r.get("gpus"))), r.get("gpus") or 0))
    ours = {(r.get("model"), r.get("gpus")): r for r in rows if r.get("framework") == "AxoNN"}
    compared = len({r.get("framework") for r in rows}) > 1
    # Where one run of ours is several configurations, there is no one to take the ratio to.
    compared = compared and len(ours) == sum(r.get("framework") == "AxoNN" for r in rows)

    def ratio(row: Mapping[str, Any]) -> float | None:
        own = ours.get((row.get("model"), row.get("gpus")))
        if not compared or not in_ratios(row, own):
            return None
        time, reference = row.get("batch_time_s"), mapping(own).get("batch_time_s")
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
        pair = (expected(row), row.get("batch_time_s") if in_ratios(row) else None)
        return 100 * (pair[0] / pair[1] - 1) if all(map(is_number, pair)) and pair[1] else None

    form = seconds_like(t for r in rows for t in (r.get("batch_time_s"), repeats(r, max), expected(r)))
    return table(
        title,
        rows,
        [
            *_who(rows, gpus="ranks"),
            Column(heading=GRID_HEADING, value=lambda r: grid_text(r.get("grid")), form=texts),
            Column(heading="measured, median", value=_get("batch_time_s"), form=form),
            Column(heading="least", value=lambda r: repeats(r, min), form=form),
            Column(heading="most", value=lambda r: repeats(r, max), form=form),
            Column(heading="measured, ratio to AxoNN", value=ratio, form=ratios),
            Column(heading="predicted", value=expected, form=form),
            Column(heading="error of predicted", value=error, form=errors),
            Column(heading="measured, GFLOP/s per rank", value=gflops, form=numbers),
            Column(heading="measured, loss at the end", value=_get("final_loss"), form=numbers),
            Column(heading="measured, processor seconds", value=_get("processor_s"), form=plain_seconds),
            _MACHINE_BUSY,
        ],
    )


def _details(rows: Sequence[Mapping[str, Any]], *, parts: bool) -> Iterator[ReportTable]:
    """Parts (if wanted), memory and bytes of every point, folded."""
    some = [r for r in rows if parts and mapping(r.get("parts_s"))]
    who = [*_who(rows, gpus="GPUs or ranks"), Column(heading="kind", value=_get("kind"), form=texts)]
    if some:
        names_of = list(dict.fromkeys(p for r in some for p in r["parts_s"]))
        form = plain_seconds
        columns = [
            Column(heading=words(p), value=lambda r, p=p: r["parts_s"].get(p), form=form)  # type: ignore[misc]
            for p in names_of
        ]
        found = table(
            "Where the time of a batch goes, by spans, mean of the ranks", some, [*who, *columns, _MACHINE_BUSY]
        )
        yield ReportTable(**{**vars(found), "folded": True})
    axes = list(dict.fromkeys(a for r in rows for a in mapping(r.get("bytes_per_batch"))))
    columns = [
        Column(heading=GRID_HEADING, value=lambda r: grid_text(r.get("grid")), form=texts),
        Column(heading="microbatch", value=_get("microbatch_size"), form=numbers),
        Column(heading="peak memory", value=_get("memory_bytes"), form=sizes),
        Column(heading="processor seconds", value=_get("processor_s"), form=plain_seconds),
        Column(heading="load", value=_get("load"), form=numbers),
        Column(heading="cores taken by others", value=_others_pct, form=percents),
        _MACHINE_BUSY,
        *(
            Column(
                heading=f"sent along {ALL_AXES.get(a, a)}",
                value=lambda r, a=a: mapping(r.get("bytes_per_batch")).get(a),
                form=sizes,
            )
            for a in axes
        ),
    ]
    if rows:
        found = table(
            "Configuration, memory of the fullest rank, and bytes that a rank sends for a batch", rows, [*who, *columns]
        )
        yield ReportTable(**{**vars(found), "folded": True})
