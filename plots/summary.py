"""Tables of a figure's points, published, predicted and measured side by side: as rows, and on the screen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean, median
from typing import Any

from rich import box
from rich.table import Table

from axonn.observability.records import Record
from axonn.perf.timing.constant_rate import naive_constant, naive_predict
from axonn.training.provenance import THIS_MACHINE

Key = tuple[str, str]
"""(point, framework)"""
BUSY_MARK = " *"
"""Suffix of what was measured while the machine was busy with other work."""
DISTINCT = 0.05
"""Relative difference below which published times count as equal when orders are compared."""


def key(record: Record) -> Key:
    """Return point and framework of a record."""
    return record.point, record.ran.framework


def group(records: Iterable[Record]) -> dict[Key, list[Record]]:
    """Return the records that succeeded, by point and framework (a measured point may have been repeated)."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        if record.failure is None:
            groups.setdefault(key(record), []).append(record)
    return groups


def quiet(records: Sequence[Record]) -> list[Record]:
    """Return the repeats during which the machine was not busy with other work; all of them where it always was."""
    return [r for r in records if r.busy is not True] or list(records)


def busy_of(records: Sequence[Record]) -> bool | None:
    """Return whether the machine was busy during all of these repeats; None where that is unknown for one of them."""
    known = [r.busy for r in records]
    return None if None in known else all(known)


def typical(records: Sequence[Record]) -> Record:
    """Return the record whose time is nearest to the median of all."""
    times = [r.batch_time_s for r in records if r.batch_time_s is not None]
    if not times:
        return records[0]
    middle = median(times)
    return min(records, key=lambda r: abs((r.batch_time_s or 0.0) - middle))


def _work(record: Record) -> tuple[str, int]:
    return record.asked.model, record.asked.gpus


def here(row: Mapping[str, Any]) -> bool:
    """Return whether a row was measured on this machine, and not on a cluster."""
    machine = row.get("machine")
    name = machine.get("name") if isinstance(machine, Mapping) else machine
    return row.get("kind") == "measured" and name == THIS_MACHINE


def machine_of(row: Mapping[str, Any]) -> str:
    """Return the name of the machine of a row."""
    machine = row.get("machine")
    return str(machine.get("name") if isinstance(machine, Mapping) else machine)


def at_scale(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> bool:
    """Return whether a row's point is published or predicted, too, and the row was not measured on this machine."""
    at_scale_points = {(r["point"], r["framework"]) for r in rows if r["kind"] != "measured"}
    return row["kind"] != "measured" or (not here(row) and (row["point"], row["framework"]) in at_scale_points)


def elsewhere(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int | None], list[dict[str, Any]]]:
    """Return the small points measured on other machines, by machine and batch, since times of different work must not
    be mixed. Runs of one machine with different batches belong to different sizes of it."""
    by_machine: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in rows:
        if not at_scale(rows, row) and not here(row):
            by_machine.setdefault((machine_of(row), row.get("batch_size")), []).append(row)
    return dict(sorted(by_machine.items(), key=lambda pair: (pair[0][0], pair[0][1] or 0)))


def device_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the device that the ranks of these rows, of one machine, computed on."""
    device = str(rows[0]["machine"].get("device") or "device not known")
    return "CPU" if device == "cpu" else device


def measured_key(record: Record) -> tuple[str, str, str, int | None]:
    """Return the attributes that repeats share: point, framework, machine, and on other machines the batch."""
    local = record.machine.name == THIS_MACHINE
    return *key(record), record.machine.name, None if local else record.asked.batch_size


def repeats_of(records: Iterable[Record]) -> dict[tuple[str, str, str, int | None], list[Record]]:
    """Return the measured records that succeeded, by `measured_key`."""
    repeats: dict[tuple[str, str, str, int | None], list[Record]] = {}
    for record in records:
        if record.failure is None and record.kind == "measured":
            repeats.setdefault(measured_key(record), []).append(record)
    return repeats


def rows_of(published: Sequence[Record], others: Sequence[Record], *, with_busy: bool = False) -> list[dict[str, Any]]:
    """Return one row per kind, point and framework. Times are seconds; a repeated measurement counts with its median,
    and its parts, phases, overlap and bytes are those of the run nearest to it.

    Repeats during which the machine was busy with other work do not count beside others (`quiet`). Of a row that has no
    others, `busy` is true and `in_ratios` false: no ratio or error is made of its time. `with_busy`: all count.
    """
    reference = {key(r): r for r in published}
    rows = []
    for kind in ("published", "predicted", "measured"):
        records = [r for r in [*published, *others] if r.kind == kind]
        for repeats in (repeats_of(records) if kind == "measured" else group(records)).values():
            rows.append(_row(kind, repeats, reference, with_busy=with_busy))
    return rows


def _row(kind: str, repeats: Sequence[Record], reference: Mapping[Key, Record], *, with_busy: bool) -> dict[str, Any]:
    """Return the row of a point's repeats. `reference`: the published records."""
    counted = repeats if with_busy else quiet(repeats)
    record = typical(counted)
    busy = busy_of(counted) if kind == "measured" else False
    in_ratios = with_busy or not busy
    times = [r.batch_time_s for r in counted if r.batch_time_s is not None]
    # A published point may have nothing but phases.
    time = median(times) if times else None
    published_s = None if kind == "published" else _published_time(reference.get(key(record)), record)
    error_pct = None if published_s is None or time is None or not in_ratios else 100 * (time / published_s - 1)
    row: dict[str, Any] = {
        "point": record.point,
        "framework": record.ran.framework,
        "model": record.asked.model,
        "gpus": record.asked.gpus,
        "kind": kind,
        "machine": record.machine.name,
        "batch_time_s": time,
        "pct_peak": record.pct_peak,
        "published_s": published_s,
        "error_pct": error_pct,
        "grid": record.ran.grid.extents(),
        "microbatch_size": record.ran.microbatch_size,
        "sub_shards": record.ran.overdecomposition,
        "schedule": record.ran.model_dump(exclude_none=True).get("schedule"),
        "parts_s": record.parts_s or None,
        "phases_s": record.phases_s or None,
        "overlap_s": record.overlap_s or None,
        "bytes_per_batch": record.bytes_per_batch or None,
        "run_folder": record.run_folder,
        "memory_bytes": max((r.memory_bytes for r in counted if r.memory_bytes), default=None),
        "memory_parts": record.memory_parts or None,
        "memory_of_all": record.memory_of_all or None,
        "source": record.source,
        "note": record.note,
    }
    if kind == "measured":
        row |= {
            "repeats_s": times,
            "typical_s": record.batch_time_s,
            "busy": busy,
            "in_ratios": in_ratios,
            "others_share": max((r.busy_share for r in counted if r.busy_share is not None), default=None),
            "busy_repeats": sum(r.busy is True for r in repeats),
        } | _measured_entries(record, counted)
    return row


def _measured_entries(record: Record, counted: Sequence[Record]) -> dict[str, Any]:
    """Return what a row has of its run, and of the repeats that count, if it was measured."""
    entries = {
        "processor_s": processor_s(counted),
        "load": max((u.load for r in counted for u in r.counted_usage), default=None),
        "tflops_per_gpu": median(r.tflops_per_gpu_without_recompute or 0.0 for r in counted),
        "final_loss": record.losses[-1] if record.losses else None,
        "machine": record.machine.model_dump(exclude_none=True),
    }
    return entries if record.machine.name == THIS_MACHINE else entries | {"batch_size": record.asked.batch_size}


def _published_time(published: Record | None, record: Record) -> float | None:
    """Return the published seconds of a record's point; None for other work, by model or GPUs, of the same name."""
    return published.batch_time_s if published is not None and _work(published) == _work(record) else None


def processor_s(records: Sequence[Record]) -> float | None:
    """Return the processor seconds of all ranks for a batch: the median over repeats of the mean over batches."""
    means = [mean(u.processor_s for u in r.counted_usage) for r in records if r.counted_usage]
    return median(means) if means else None


def compared(*rows: Mapping[str, Any] | None) -> bool:
    """Return whether none of these rows is missing, and a ratio may be made of their times."""
    return all(row is not None and row.get("in_ratios", True) for row in rows)


def called(row: Mapping[str, Any]) -> str:
    """Return the framework of a row, marked where the machine was busy."""
    return f"{row['framework']}{BUSY_MARK if row.get('busy') else ''}"


def busy_points(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each point measured while the machine was busy."""
    return [
        f"{row['point']} {row['framework']}{'' if here(row) else f' on {machine_of(row)}'}: others took "
        f"{row['others_share']:.0%} of the cores"
        for row in rows
        if row.get("busy")
    ]


def unknown_points(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the points of this machine of which it is unknown whether it was busy: older records do not say."""
    return [f"{row['point']} {row['framework']}" for row in rows if here(row) and row.get("busy", False) is None]


def mape(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean absolute error in percent by kind, of each framework and of all."""
    errors: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["error_pct"] is not None:
            by_framework = errors.setdefault(row["kind"], {})
            for name in (row["framework"], "all"):
                by_framework.setdefault(name, []).append(abs(row["error_pct"]))
    return {
        kind: {name: mean(values) for name, values in by_framework.items()} for kind, by_framework in errors.items()
    }


def wrong_orders(rows: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """Return a line for each pair of frameworks whose order at one size differs from the published one."""
    lines = []
    comparable = [r for r in rows if r["kind"] == kind and r["published_s"] is not None and compared(r)]
    for a in comparable:
        for b in comparable:
            same = (a["model"], a["gpus"], machine_of(a)) == (b["model"], b["gpus"], machine_of(b))
            if same and a["published_s"] * (1 + DISTINCT) < b["published_s"] and a["batch_time_s"] >= b["batch_time_s"]:
                lines.append(f"{a['model']}: {a['framework']} is published faster than {b['framework']}, not {kind} so")
    return lines


def naive(published: Sequence[Record]) -> dict[str, Any]:
    """Return the predictions of a constant TFLOP/s, fitted on the very points it predicts: a baseline for the model."""
    batches = [(r.asked.flops(recompute=True), r.asked.gpus, r.batch_time_s or 0.0) for r in published]
    rate = naive_constant(batches)
    rows: list[dict[str, Any]] = []
    for r in published:
        time = naive_predict(flops=r.asked.flops(recompute=True), gpus=r.asked.gpus, flops_per_s=rate)
        assert r.batch_time_s is not None
        rows.append(
            {
                "framework": r.ran.framework,
                "model": r.asked.model,
                "gpus": r.asked.gpus,
                "batch_time_s": time,
                "error_pct": 100 * (time / r.batch_time_s - 1),
            }
        )
    return {
        "tflops_per_gpu": rate / 1e12,
        "fitted_on": "the published points themselves",
        "mape_pct": mean(abs(r["error_pct"]) for r in rows),
        "rows": rows,
    }


def _table(title: str, *names: str) -> Table:
    """Return an empty table that fits a terminal of 80 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def small_table(title: str, first: str, *numbers: str) -> Table:
    """Return an empty table whose columns are numbers, but for the first."""
    table = _table(title, first)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def published_table(rows: Sequence[dict[str, Any]], constant: dict[str, Any]) -> Table:
    """Return the table of published, predicted and, where a cluster's records were collected, measured times at the
    published scale. `constant`: see `naive`."""
    on_clusters = [r for r in rows if r["kind"] == "measured" and r["published_s"] is not None]
    machines = list(dict.fromkeys(machine_of(r) for r in on_clusters))
    table = _table("At the published scale: seconds per batch", "model", "GPUs", "framework")
    for name in ("published", "predicted", "error", *(f"measured,\n{name}" for name in machines), "constant", "error"):
        table.add_column(name, justify="right")
    by = {(r["kind"], r["model"], r["gpus"], r["framework"]): r for r in rows if r["kind"] != "measured"}
    measured = {(machine_of(r), r["model"], r["gpus"], r["framework"]): r for r in rows if r["kind"] == "measured"}
    flat = {(r["model"], r["gpus"], r["framework"]): r for r in constant["rows"]}
    previous = None
    for row in (r for r in rows if r["kind"] == "published"):
        point = (row["model"], row["gpus"], row["framework"])
        if previous is not None and row["model"] != previous:
            table.add_section()
        previous = row["model"]
        predicted = by.get(("predicted", *point))
        runs = [measured.get((name, *point)) for name in machines]
        table.add_row(
            str(row["model"]),
            str(row["gpus"]),
            str(row["framework"]),
            f"{row['batch_time_s']:.1f}",
            "-" if predicted is None else f"{predicted['batch_time_s']:.1f}",
            "-" if predicted is None else f"{predicted['error_pct']:+.1f}%",
            *("-" if r is None else f"{r['batch_time_s']:.1f}{BUSY_MARK if r.get('busy') else ''}" for r in runs),
            f"{flat[point]['batch_time_s']:.1f}",
            f"{flat[point]['error_pct']:+.1f}%",
        )
    return table


def measured_tables(rows: Sequence[dict[str, Any]], failures: Sequence[Record]) -> Iterator[Table]:
    """Yield the table of measured times on this machine, with the spread of the repeats and the ratio to our engine,
    and one for each other machine that has small points."""
    local_failures = [r for r in failures if r.machine.name == THIS_MACHINE]
    yield _measured_table("On this machine", [r for r in rows if here(r)], local_failures)
    for (machine, batch), machine_rows in elsewhere(rows).items():
        yield _measured_table(f"On {machine} ({device_of(machine_rows)}), batch {batch}", machine_rows, [])


def _measured_table(where: str, rows: Sequence[dict[str, Any]], failures: Sequence[Record]) -> Table:
    table = _table(f"{where}: seconds per batch (ratio to AxoNN; GFLOP/s per rank)", "model", "ranks", "framework")
    for name in ("median", "least", "most", "ratio", "loss", "GFLOP/s"):
        table.add_column(name, justify="right")
    ours = {(r["model"], r["gpus"]): r for r in rows if r["framework"] == "AxoNN"}
    for row in sorted(rows, key=lambda r: (r["gpus"], r["framework"])):
        reference = ours.get((row["model"], row["gpus"]))
        table.add_row(
            str(row["model"]),
            str(row["gpus"]),
            called(row),
            f"{row['batch_time_s']:.3f}",
            f"{min(row['repeats_s']):.3f}",
            f"{max(row['repeats_s']):.3f}",
            f"{row['batch_time_s'] / reference['batch_time_s']:.3f}" if reference and compared(row, reference) else "-",
            "-" if row["final_loss"] is None else f"{row['final_loss']:.4f}",
            f"{1000 * row['tflops_per_gpu']:.1f}",
        )
    for record in failures:
        assert record.failure is not None
        if record.failure.cause == "unavailable":
            continue
        table.add_row(
            record.asked.model, str(record.asked.gpus), record.ran.framework, f"failed: {record.failure.cause}"
        )
    return table


def failed(failures: Iterable[Record]) -> list[str]:
    """Return a line for each run that failed."""
    return [
        f"failed: {r.point} {r.ran.framework}{_on(r)}: {r.failure.cause}, {r.failure.detail}"
        for r in failures
        if r.failure is not None and r.failure.cause != "unavailable"
    ]


def _on(record: Record) -> str:
    return "" if record.machine.name == THIS_MACHINE or record.kind != "measured" else f" on {record.machine.name}"


def not_run(failures: Sequence[Record]) -> list[str]:
    """Return a line for each framework that was not run, with the numbers of ranks and the reason."""
    ranks: dict[tuple[str, str], set[int]] = {}
    for record in failures:
        if record.failure is not None and record.failure.cause == "unavailable":
            ranks.setdefault((record.ran.framework, record.failure.detail), set()).add(record.asked.gpus)
    return [
        f"not run: {name} on {', '.join(map(str, sorted(counts)))} rank(s): {reason}"
        for (name, reason), counts in ranks.items()
    ]
