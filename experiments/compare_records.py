"""Comparison of records or summaries of several frameworks (`axonn compare`), with ratios and a bound to hold.

Runs are compared if they did the same work (model, devices, point) and are of one kind: published, predicted and
measured times never meet in a ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

from rich import box
from rich.table import Table

from axonn.config.loading import shortened
from axonn.durable_files import read_json, reason_of
from axonn.errors import RecordError
from axonn.observability.records import SCHEMA, Record, RecordKind, read_records


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One framework's run of some work; a repeated one is several entries."""

    kind: RecordKind
    work: str
    """Description of the work; equal for all runs that may be compared."""
    framework: str
    variant: str
    """Distinguishes several ways in which a framework ran the same work."""
    seconds: float | None
    """Seconds of a batch; None for a run that failed."""
    failure: str | None = None
    busy: bool = False
    """True if the machine is known to have been busy with other work (`axonn.observability.machine_usage`)."""


def load(paths: Sequence[Path]) -> list[ComparedRun]:
    """Return the entries of record files, summaries, and all such files in folders.

    Raises `RecordError` naming the file that cannot be read, or a folder without any record.
    """
    entries: list[ComparedRun] = []
    for path in paths:
        if path.is_dir():
            files = sorted(path.rglob("*.json"))
            in_folder = [entry for file in files for entry in _read(file, required=False) or ()]
            if not in_folder:
                raise RecordError(f"{path}: holds no records; name record files, summaries or folders of them")
            entries += in_folder
        else:
            entries += _read(path, required=True) or []
    return entries


def _read(path: Path, *, required: bool) -> list[ComparedRun] | None:
    """Return the entries of a file; None for one with neither records nor a summary, unless `required`."""
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read: {reason_of(error)}") from error
    if isinstance(data, dict) and "schema" in data and (required or data["schema"] == SCHEMA):
        return [_of_record(record) for record in read_records(path)]
    if isinstance(data, dict) and isinstance(data.get("rows"), list):
        return [_of_row(row, f"{path}: row {number}") for number, row in enumerate(data["rows"], 1)]
    if required:
        raise RecordError(f"{path}: is neither a record file nor a summary with rows")
    return None


def _of_record(record: Record) -> ComparedRun:
    asked, ran = record.asked, record.ran
    timed = record.batch_times_s[record.warmup_batches or 0 :]
    schedule = "" if ran.schedule is None else ran.schedule.name
    grid = " x ".join(f"{axis} {extent}" for axis, extent in ran.grid.extents().items() if extent != 1)
    # Only the note distinguishes these records of one point for a reader.
    named = record.note.partition(";")[0] if record.experiment == "baselines" and record.note else ""
    return ComparedRun(
        kind=record.kind,
        work=f"{record.point}: {asked.model}, {asked.parameters} parameters, batch {asked.batch_size}, "
        f"{asked.gpus} devices, {asked.precision}",
        framework=ran.framework,
        variant=named or ", ".join(part for part in (grid, schedule) if part),
        seconds=None if record.batch_time_s is None else median(timed) if timed else record.batch_time_s,
        failure=None if record.failure is None else f"{record.failure.cause}: {record.failure.detail}",
        busy=record.busy is True,
    )


def _of_row(row: Any, where: str) -> ComparedRun:
    try:
        kind, failure = row["kind"], row.get("failure")
        if kind not in get_args(RecordKind):
            raise RecordError(f"{where}: has kind '{kind}', known are {', '.join(get_args(RecordKind))}")
        # Keys by which rows of figures and of the comparison describe their work.
        names = ("workload", "model", "gpus", "ranks", "parallelism", "condition")
        return ComparedRun(
            kind=kind,
            work=", ".join(str(row[name]) for name in names if row.get(name) is not None),
            framework=str(row["framework"]),
            variant=str(row.get("strategy") or ""),
            seconds=None if failure else _time(row["batch_time_s"]),
            failure=f"{failure['cause']}: {failure['detail']}" if failure else None,
            busy=row.get("busy") is True,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RecordError(f"{where}: is no row of a summary: {type(error).__name__}: {error}") from error


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"batch_time_s is {shortened(value)}, and no time")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class ComparedTime:
    """A framework's time for some work, compared with the base's."""

    kind: RecordKind
    work: str
    framework: str
    variant: str
    runs: int
    seconds: float | None
    ratio: float | None
    """Ratio to the fastest variant of the base; below 1 this one is faster."""
    base: bool
    failure: str | None
    busy: bool = False
    """True if the machine was busy in all runs."""

    @property
    def title(self) -> str:
        """Short description of the work."""
        return self.work.partition(": ")[0]


def compare(entries: Iterable[ComparedRun], base: str, *, with_busy: bool = False) -> list[ComparedTime]:
    """Return the times by kind and work, the base first; of repeated runs the median.

    Unless `with_busy`, runs of a busy machine do not count if there are others, and if there are none they get no
    ratio. Raises `RecordError` when no work was done by both the base and another framework.
    """
    entries = list(entries)
    names = sorted({entry.framework for entry in entries})
    if base not in names:
        raise RecordError(f"there is no record of '{base}'; frameworks in these records: {', '.join(names) or 'none'}")
    lines: list[ComparedTime] = []
    for kind in get_args(RecordKind):
        works = dict.fromkeys(entry.work for entry in entries if entry.kind == kind)
        for work in works:
            same_work = [e for e in entries if e.kind == kind and e.work == work]
            lines += _lines(same_work, base, with_busy=with_busy)
    if any(line.busy for line in lines) and not any(line.ratio is not None and not line.base for line in lines):
        raise RecordError(
            "nothing to compare but what was measured while the machine was busy with other work; measure it anew when "
            "it is idle (axonn run FILE --fresh-busy), or take it in with --with-busy"
        )
    if not any(line.ratio is not None and not line.base for line in lines):
        raise RecordError(
            f"nothing to compare: no work of one kind has a time of '{base}' and one of another framework"
        )
    return lines


def _lines(entries: Sequence[ComparedRun], base: str, *, with_busy: bool) -> list[ComparedTime]:
    """Return the times of one kind and work."""
    runs: dict[tuple[str, str], list[ComparedRun]] = {}
    for entry in entries:
        runs.setdefault((entry.framework, entry.variant), []).append(entry)
    if not with_busy:
        runs = {way: [e for e in group if not e.busy] or group for way, group in runs.items()}
    busy = {way: all(e.busy for e in group) for way, group in runs.items()}
    excluded = {way for way, is_busy in busy.items() if is_busy and not with_busy}
    times = {way: [e.seconds for e in group if e.seconds is not None] for way, group in runs.items()}
    medians = {way: median(seconds) if seconds else None for way, seconds in times.items()}
    of_base = (s for way, s in medians.items() if way[0] == base and s is not None and way not in excluded)
    fastest = min(of_base, default=None)
    lines = [
        ComparedTime(
            kind=group[0].kind,
            work=group[0].work,
            framework=way[0],
            variant=way[1],
            runs=len(times[way]),
            seconds=seconds,
            ratio=None if fastest is None or seconds is None or way in excluded else seconds / fastest,
            base=way[0] == base,
            busy=busy[way],
            failure=next((e.failure for e in group if e.failure is not None), None) if seconds is None else None,
        )
        for way, group in runs.items()
        for seconds in (medians[way],)
    ]
    return sorted(lines, key=lambda line: (not line.base, line.seconds is None, line.seconds or 0.0))


def behind(lines: Sequence[ComparedTime], above: float) -> list[str]:
    """Return a text for each work in which the base takes more than `above` times as long as the fastest other
    framework."""
    slower = []
    others: dict[tuple[str, str], list[tuple[float, ComparedTime]]] = {}
    for line in lines:
        if line.ratio is not None and not line.base:
            others.setdefault((line.kind, line.work), []).append((line.ratio, line))
    for rivals in others.values():
        ratio, best = min(rivals, key=lambda one: one[0])
        if 1 / ratio > above:
            where = f"{best.kind}, {best.title}"
            slower.append(f"{where}: {1 / ratio:.3f} of the time of {best.framework}, more than {above:g}")
    return slower


def table_of(lines: Sequence[ComparedTime], base: str) -> Table:
    """Return the table of all times; each kind of point has sections of its own."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("kind", no_wrap=True)
    table.add_column("framework")
    for name in ("runs", "seconds", f"ratio to {base}"):
        table.add_column(name, justify="right", no_wrap=True)
    previous: tuple[str, str] | None = None
    for line in lines:
        if (line.kind, line.work) != previous:
            if previous is not None:
                table.add_section()
            previous = (line.kind, line.work)
            table.add_row("", f"[bold]{line.title}[/bold]")
        name = f"{line.framework} ({line.variant})" if line.variant else line.framework
        name += " (busy)" if line.busy else ""
        if line.seconds is None:
            table.add_row(line.kind, name, "0", "failed", (line.failure or "").partition(":")[0])
            continue
        ratio = "-" if line.ratio is None else f"{line.ratio:.3f}"
        table.add_row(line.kind, name, str(line.runs), f"{line.seconds:.4g}", ratio)
    return table
