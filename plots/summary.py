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
"""Behind what was measured while the machine was busy with other work."""
DISTINCT = 0.05
"""Published times that differ by less are taken for equal when orders are compared."""


def key(record: Record) -> Key:
    return record.point, record.ran.framework


def group(records: Iterable[Record]) -> dict[Key, list[Record]]:
    """Records that succeeded, by point and framework (a measured point may have been repeated)."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        if record.failure is None:
            groups.setdefault(key(record), []).append(record)
    return groups


def quiet(records: Sequence[Record]) -> list[Record]:
    """Those of repeats while which the machine was not busy with other work; all of them where it always was."""
    return [r for r in records if r.busy is not True] or list(records)


def busy_of(records: Sequence[Record]) -> bool | None:
    """Whether the machine was busy during all of these repeats; None where nobody knows of one of them."""
    known = [r.busy for r in records]
    return None if None in known else all(known)


def typical(records: Sequence[Record]) -> Record:
    """The one whose time is nearest to the median of all."""
    times = [r.batch_time_s for r in records if r.batch_time_s is not None]
    if not times:
        return records[0]
    middle = median(times)
    return min(records, key=lambda r: abs((r.batch_time_s or 0.0) - middle))


def _work(record: Record) -> tuple[str, int]:
    return record.asked.model, record.asked.gpus


def here(row: Mapping[str, Any]) -> bool:
    """Whether a row was measured on this machine, and not on a cluster."""
    machine = row.get("machine")
    name = machine.get("name") if isinstance(machine, Mapping) else machine
    return row.get("kind") == "measured" and name == THIS_MACHINE


def machine_of(row: Mapping[str, Any]) -> str:
    """Name of the machine of a row."""
    machine = row.get("machine")
    return str(machine.get("name") if isinstance(machine, Mapping) else machine)


def at_scale(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> bool:
    """Whether a row is of a point that is published or predicted, too, and was not measured on this machine."""
    there = {(r["point"], r["framework"]) for r in rows if r["kind"] != "measured"}
    return row["kind"] != "measured" or (not here(row) and (row["point"], row["framework"]) in there)


def elsewhere(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int | None], list[dict[str, Any]]]:
    """What was measured small on other machines, by machine and batch: times of different work are told apart. Runs of
    one machine with different batches belong to different sizes of it."""
    found: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in rows:
        if not at_scale(rows, row) and not here(row):
            found.setdefault((machine_of(row), row.get("batch_size")), []).append(row)
    return dict(sorted(found.items(), key=lambda pair: (pair[0][0], pair[0][1] or 0)))


def device_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the ranks of these rows, of one machine, computed on."""
    device = str(rows[0]["machine"].get("device") or "device not known")
    return "CPU" if device == "cpu" else device


def measured_key(record: Record) -> tuple[str, str, str, int | None]:
    """What repeats of one another share: point, framework, machine, and of other machines the batch."""
    mine = record.machine.name == THIS_MACHINE
    return *key(record), record.machine.name, None if mine else record.asked.batch_size


def repeats_of(records: Iterable[Record]) -> dict[tuple[str, str, str, int | None], list[Record]]:
    """Measured records that succeeded, by `measured_key`."""
    found: dict[tuple[str, str, str, int | None], list[Record]] = {}
    for record in records:
        if record.failure is None and record.kind == "measured":
            found.setdefault(measured_key(record), []).append(record)
    return found


def rows_of(published: Sequence[Record], others: Sequence[Record], *, with_busy: bool = False) -> list[dict[str, Any]]:
    """One row per kind, point and framework. Times are seconds; a repeated measurement counts with its median, and its
    parts, phases, overlap and bytes are those of the run nearest to it.

    Repeats while which the machine was busy with other work do not count beside others (`quiet`). Of a row that has no
    others, `busy` is true and `in_ratios` false: no ratio or error is made of its time. `with_busy`: all count.
    """
    reference = {key(r): r for r in published}
    rows = []
    for kind in ("published", "predicted", "measured"):
        own = [r for r in [*published, *others] if r.kind == kind]
        for repeats in (repeats_of(own) if kind == "measured" else group(own)).values():
            records = repeats if with_busy else quiet(repeats)
            first = typical(records)
            busy = busy_of(records) if kind == "measured" else False
            in_ratios = with_busy or not busy
            times = [r.batch_time_s for r in records if r.batch_time_s is not None]
            compared = reference.get(key(first)) if kind != "published" else None
            if compared is not None and _work(compared) != _work(first):
                # Another model, or on other GPUs, under the same name.
                compared = None
            known = None if compared is None else compared.batch_time_s
            # A published point may have nothing but phases.
            time = median(times) if times else None
            row: dict[str, Any] = {
                "point": first.point,
                "framework": first.ran.framework,
                "model": first.asked.model,
                "gpus": first.asked.gpus,
                "kind": kind,
                "machine": first.machine.name,
                "batch_time_s": time,
                "pct_peak": first.pct_peak,
                "published_s": known,
                "error_pct": None if known is None or time is None or not in_ratios else 100 * (time / known - 1),
                "grid": first.ran.grid.extents(),
                "microbatch_size": first.ran.microbatch_size,
                "sub_shards": first.ran.overdecomposition,
                "schedule": first.ran.model_dump(exclude_none=True).get("schedule"),
                "parts_s": first.parts_s or None,
                "phases_s": first.phases_s or None,
                "overlap_s": first.overlap_s or None,
                "bytes_per_batch": first.bytes_per_batch or None,
                "run_folder": first.run_folder,
                "memory_bytes": max((r.memory_bytes for r in records if r.memory_bytes), default=None),
                "memory_parts": first.memory_parts or None,
                "memory_of_all": first.memory_of_all or None,
                "source": first.source,
                "note": first.note,
            }
            if kind == "measured":
                row |= {
                    "repeats_s": times,
                    "typical_s": first.batch_time_s,
                    "busy": busy,
                    "in_ratios": in_ratios,
                    "others_share": max((r.busy_share for r in records if r.busy_share is not None), default=None),
                    "busy_repeats": sum(r.busy is True for r in repeats),
                    "processor_s": processor_s(records),
                    "load": max((u.load for r in records for u in r.counted_usage), default=None),
                    "tflops_per_gpu": median(r.tflops_per_gpu_without_recompute or 0.0 for r in records),
                    "final_loss": first.losses[-1] if first.losses else None,
                    "machine": first.machine.model_dump(exclude_none=True),
                }
                if first.machine.name != THIS_MACHINE:
                    row["batch_size"] = first.asked.batch_size
            rows.append(row)
    return rows


def processor_s(records: Sequence[Record]) -> float | None:
    """Processor seconds of all ranks for a batch, the median over repeats of the mean over batches."""
    each = [mean(u.processor_s for u in r.counted_usage) for r in records if r.counted_usage]
    return median(each) if each else None


def compared(*rows: Mapping[str, Any] | None) -> bool:
    """Whether there are all of these rows, and a ratio may be made of their times."""
    return all(row is not None and row.get("in_ratios", True) for row in rows)


def called(row: Mapping[str, Any]) -> str:
    """The framework of a row, marked where the machine was busy."""
    return f"{row['framework']}{BUSY_MARK if row.get('busy') else ''}"


def busy_points(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Points that were measured while the machine was busy, in words."""
    return [
        f"{row['point']} {row['framework']}{'' if here(row) else f' on {machine_of(row)}'}: others took "
        f"{row['others_share']:.0%} of the cores"
        for row in rows
        if row.get("busy")
    ]


def unknown_points(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Points of this machine of which nobody knows whether it was busy: their records are from before they said it."""
    return [f"{row['point']} {row['framework']}" for row in rows if here(row) and row.get("busy", False) is None]


def mape(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean absolute error in percent by kind, of each framework and of all."""
    errors: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["error_pct"] is not None:
            of_kind = errors.setdefault(row["kind"], {})
            for name in (row["framework"], "all"):
                of_kind.setdefault(name, []).append(abs(row["error_pct"]))
    return {kind: {name: mean(values) for name, values in of.items()} for kind, of in errors.items()}


def wrong_orders(rows: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """Pairs of frameworks whose order at one size is another than the published one."""
    found = []
    mine = [r for r in rows if r["kind"] == kind and r["published_s"] is not None and compared(r)]
    for a in mine:
        for b in mine:
            same = (a["model"], a["gpus"], machine_of(a)) == (b["model"], b["gpus"], machine_of(b))
            if same and a["published_s"] * (1 + DISTINCT) < b["published_s"] and a["batch_time_s"] >= b["batch_time_s"]:
                found.append(f"{a['model']}: {a['framework']} is published faster than {b['framework']}, not {kind} so")
    return found


def naive(published: Sequence[Record]) -> dict[str, Any]:
    """The constant-TFLOP/s predictor, fitted on the very points it predicts, for comparison with the model."""
    batches = [(r.asked.flops(recompute=True), r.asked.gpus, r.batch_time_s or 0.0) for r in published]
    rate = naive_constant(batches)
    rows = []
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
    """An empty table that fits a terminal of 80 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def small_table(title: str, first: str, *numbers: str) -> Table:
    """An empty table whose columns but the first are numbers."""
    table = _table(title, first)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def published_table(rows: Sequence[dict[str, Any]], constant: dict[str, Any]) -> Table:
    """Published, predicted and, where a cluster's records were collected, measured times at the published scale."""
    at_scale = [r for r in rows if r["kind"] == "measured" and r["published_s"] is not None]
    machines = list(dict.fromkeys(machine_of(r) for r in at_scale))
    table = _table("At the published scale: seconds per batch", "model", "GPUs", "framework")
    for name in ("published", "predicted", "error", *(f"measured,\n{name}" for name in machines), "constant", "error"):
        table.add_column(name, justify="right")
    by = {(r["kind"], r["model"], r["gpus"], r["framework"]): r for r in rows if r["kind"] != "measured"}
    measured = {(machine_of(r), r["model"], r["gpus"], r["framework"]): r for r in rows if r["kind"] == "measured"}
    flat = {(r["model"], r["gpus"], r["framework"]): r for r in constant["rows"]}
    previous = None
    for row in (r for r in rows if r["kind"] == "published"):
        where = (row["model"], row["gpus"], row["framework"])
        if previous is not None and row["model"] != previous:
            table.add_section()
        previous = row["model"]
        predicted = by.get(("predicted", *where))
        runs = [measured.get((name, *where)) for name in machines]
        table.add_row(
            str(row["model"]),
            str(row["gpus"]),
            str(row["framework"]),
            f"{row['batch_time_s']:.1f}",
            "-" if predicted is None else f"{predicted['batch_time_s']:.1f}",
            "-" if predicted is None else f"{predicted['error_pct']:+.1f}%",
            *("-" if r is None else f"{r['batch_time_s']:.1f}{BUSY_MARK if r.get('busy') else ''}" for r in runs),
            f"{flat[where]['batch_time_s']:.1f}",
            f"{flat[where]['error_pct']:+.1f}%",
        )
    return table


def measured_tables(rows: Sequence[dict[str, Any]], failures: Sequence[Record]) -> Iterator[Table]:
    """Measured times on this machine, with the spread of the repeats and the ratio to our engine; a table for each
    other machine that has small points."""
    mine = [r for r in failures if r.machine.name == THIS_MACHINE]
    yield _measured_table("On this machine", [r for r in rows if here(r)], mine)
    for (machine, batch), own in elsewhere(rows).items():
        yield _measured_table(f"On {machine} ({device_of(own)}), batch {batch}", own, [])


def _measured_table(where: str, mine: Sequence[dict[str, Any]], failures: Sequence[Record]) -> Table:
    table = _table(f"{where}: seconds per batch (ratio to AxoNN; GFLOP/s per rank)", "model", "ranks", "framework")
    for name in ("median", "least", "most", "ratio", "loss", "GFLOP/s"):
        table.add_column(name, justify="right")
    ours = {(r["model"], r["gpus"]): r for r in mine if r["framework"] == "AxoNN"}
    for row in sorted(mine, key=lambda r: (r["gpus"], r["framework"])):
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
    """A line for each run that failed."""
    return [
        f"failed: {r.point} {r.ran.framework}{_on(r)}: {r.failure.cause}, {r.failure.detail}"
        for r in failures
        if r.failure is not None and r.failure.cause != "unavailable"
    ]


def _on(record: Record) -> str:
    return "" if record.machine.name == THIS_MACHINE or record.kind != "measured" else f" on {record.machine.name}"


def not_run(failures: Sequence[Record]) -> list[str]:
    """A line for each framework that was not run, with the numbers of ranks and the reason."""
    ranks: dict[tuple[str, str], set[int]] = {}
    for record in failures:
        if record.failure is not None and record.failure.cause == "unavailable":
            ranks.setdefault((record.ran.framework, record.failure.detail), set()).add(record.asked.gpus)
    return [
        f"not run: {name} on {', '.join(map(str, sorted(counts)))} rank(s): {reason}"
        for (name, reason), counts in ranks.items()
    ]
