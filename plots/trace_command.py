"""The command `axonn trace`: a run's spans as a picture, as a trace file, and as the breakdown of a batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from axonn.cli.console import console, warn
from axonn.cli.doc_links import documented
from axonn.errors import ConfigError, RecordError
from axonn.grid import AXES, ProcessGrid
from axonn.observability.perfetto_events import write_trace
from axonn.observability.records import Record, read_records
from axonn.spans import Span, TimeBreakdown, breakdown, overlap, read_spans, span_files
from axonn.training.places import PROJECT, RUNS, from_here
from axonn.training.places import find_run as folder_of_run
from axonn.training.session_history import PastSession, session_of, sessions_of
from plots import style
from plots.timeline_picture import MOST_RANKS, View, draw_timeline, whole

_FOLDERS = "spans-*.parquet"
_MOST_MISSING = 1000
"""Ranks without spans that are counted."""
_RANK = re.compile(r"spans-([0-9]{1,7})\.parquet")


@dataclass(frozen=True, kw_only=True)
class TracedRun:
    """The spans of a run, and what is known of it."""

    folder: Path
    files: dict[int, list[Path]]
    """Span files by rank; a prediction has a rank for each stage."""
    grid: ProcessGrid | None
    record: Record | None
    sessions: Sequence[PastSession] = ()
    """Those whose spans there are; of a run that went on, each may have a grid of its own."""

    def during(self, session: PastSession) -> TracedRun:
        """The spans of one session alone, with its grid."""
        grid = session.grid
        files = {rank: [p for p in own if _in(session, p)] for rank, own in self.files.items() if rank < grid.size}
        return replace(self, files={r: own for r, own in files.items() if own}, grid=grid, sessions=[session])

    @property
    def kind(self) -> str:
        """Of its points; a run that is not over has been measured all the same."""
        return "measured" if self.record is None else self.record.kind

    @property
    def expected(self) -> int:
        """Number of ranks that should have spans."""
        if self.grid is None:
            return 1 + max(self.files)
        return self.grid.inter if self.kind == "predicted" else self.grid.size

    def name(self, rank: int) -> str:
        """A rank with its place in the grid."""
        if self.grid is None:
            return f"rank {rank}"
        if self.kind == "predicted":
            return f"stage {rank} of {self.grid.inter}" if self.grid.inter > 1 else "every GPU"
        place = self.grid.coordinates(rank)._asdict() if rank < self.grid.size else {}
        said = ", ".join(f"{axis} {place[axis]}" for axis in AXES if place and self.grid.extent(axis) > 1)
        return f"rank {rank} ({said})" if said else f"rank {rank}"


def find_run(run: Path) -> TracedRun:
    """A run folder of `axonn train` or `axonn run`, a folder of predicted spans, or a record file of one run.

    Raises `RecordError` when there are no spans, saying what there is.
    """
    if run.is_file():
        run = _folder_of_records(run)
    if not run.is_dir():
        raise RecordError(f"{run}: there is no such run; {_near(run)}")
    own = {int(found[1]): p for p in run.glob(_FOLDERS) if (found := _RANK.fullmatch(p.name))}
    files = {rank: span_files(path) if path.is_dir() else [path] for rank, path in sorted(own.items())}
    files = {rank: paths for rank, paths in files.items() if paths}
    if not files:
        inside = sorted({str(p.parent) for p in run.glob(f"*/{_FOLDERS}")})
        if inside:
            shown = ", ".join(inside[:5]) + (f" and {len(inside) - 5} more" if len(inside) > 5 else "")
            raise RecordError(f"{run}: holds several runs; name one of {shown}")
        raise RecordError(
            f"{run}: there are no spans in it; they come with the first checkpoint, or at the end of a run "
            "(and axonn predict --spans writes those of predictions)"
        )
    record = _record_of(run)
    every = [path for own in files.values() for path in own]
    sessions = [one for one in sessions_of(run) if any(_in(one, path) for path in every)]
    grid = sessions[-1].grid if sessions else None if record is None else record.ran.grid
    return TracedRun(
        folder=run,
        files=files,
        grid=grid,
        record=record,
        sessions=sessions,
    )


def _in(session: PastSession, file: Path) -> bool:
    """Whether a file of spans is of this session: files begin with a session, and end at every checkpoint."""
    return session.has(int(file.stem)) if file.stem.isdecimal() else session.end is None


def session_to_show(run: TracedRun, *, step: int | None, first: bool) -> TracedRun:
    """The spans of the session of the batch that is asked for, by default of the newest one."""
    if len(run.sessions) < 2:
        return run
    asked = None if step is None else session_of(run.sessions, step)
    chosen = asked or run.sessions[0 if first else -1]
    for other in run.sessions:
        if other is not chosen:
            end = f" to {other.end - 1}" if other.end is not None else " and on"
            grid = other.grid
            console.print(
                f"not shown: batches {other.first_batch}{end}, of another start ({grid}); choose one with --step",
                soft_wrap=True,
                highlight=False,
            )
    return run.during(chosen)


def _folder_of_records(path: Path) -> Path:
    folders = {r.run_folder for r in read_records(path) if r.run_folder}
    if not folders:
        raise RecordError(f"{path}: none of its records has a run folder, so there are no spans")
    if len(folders) > 1:
        raise RecordError(f"{path}: has several runs; name one of {', '.join(sorted(folders))}")
    named = Path(folders.pop())
    # A run that was moved has its record in it all the same.
    places = [path.parent] if any(path.parent.glob(_FOLDERS)) else [named, PROJECT / named]
    folder = next((place for place in places if place.exists()), named)
    # What is drawn is written into the folder: a record of a stranger does not choose it.
    known = any(folder.resolve().is_relative_to(place.resolve()) for place in (PROJECT, Path.cwd(), path.parent))
    if folder.is_dir() and not known and not (folder / "record.json").exists():
        raise RecordError(f"{path}: names {folder}, a folder outside of the project without record.json; name it")
    return folder


def _near(run: Path) -> str:
    """What is there in its stead."""
    beside = run.parent if run.parent.is_dir() else RUNS
    names = sorted(p.name for p in beside.iterdir() if p.is_dir()) if beside.is_dir() else []
    near = get_close_matches(run.name, names, n=3)
    if near:
        return f"did you mean {' or '.join(str(beside / name) for name in near)}?"
    return f"in {beside} are {', '.join(names[:8]) or 'no folders'}{' and others' if len(names) > 8 else ''}"


def _record_of(folder: Path) -> Record | None:
    """That of a finished run: its own, or the one in results/ that names the folder."""
    predicted = folder.parent.with_suffix(".json")
    measured = folder.parent.parent / "results" / "measured" / f"{folder.name}.json"
    for path in (folder / "record.json", predicted, measured):
        try:
            records = read_records(path) if path.exists() else []
        except RecordError as error:
            warn(str(error))
            continue
        for record in records:
            if path.parent == folder or (record.run_folder and Path(record.run_folder).name == folder.name):
                return record
    return None


def load_steps(run: TracedRun, step: int | None) -> dict[int, list[Span]]:
    """Spans of the batches that are there of all ranks, by batch (with `step`: of the files that may have it).

    Says what is not whole: files that cannot be read, and batches that some ranks have not written yet. Raises
    `RecordError` when there is none.
    """
    by_rank: dict[int, dict[int, list[Span]]] = {}
    unread = 0
    for rank, files in run.files.items():
        own = by_rank.setdefault(rank, {})
        for file in files:
            if step is not None and file.stem.isdigit() and int(file.stem) > step:
                continue
            try:
                spans = read_spans(file)
            except RecordError as error:
                warn(f"{error}; its batches are left out")
                unread += 1
                continue
            for span in spans:
                own.setdefault(span.step, []).append(span)
    missing = list(islice((rank for rank in range(run.expected) if not by_rank.get(rank)), _MOST_MISSING))
    if unread and not any(by_rank.values()):
        raise RecordError(f"{run.folder}: none of its span files can be read; run it again with this version")
    if missing:
        raise RecordError(
            f"{run.folder}: {_count(missing, 'rank')} of {run.expected} have no spans yet or lost them; "
            "let the run come to its next checkpoint, or to its end"
        )
    every = set().union(*by_rank.values())
    whole_steps = sorted(set.intersection(*(set(own) for own in by_rank.values())))
    if len(whole_steps) < len(every) and step is None:
        warn(
            f"not all ranks have spans of {_count(sorted(every - set(whole_steps)), 'batch')}: "
            "the run goes on, or was cut; they are left out"
        )
    if not whole_steps:
        raise RecordError(f"{run.folder}: there is no batch of which all ranks have spans")
    return {s: [span for own in by_rank.values() for span in own[s]] for s in whole_steps}


def _count(numbers: Sequence[int], what: str) -> str:
    """Some numbers of ranks or batches, in words."""
    shown = ", ".join(map(str, numbers[:6])) + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")
    plural = {"batch": "batches"}.get(what, f"{what}s")
    return f"{what if len(numbers) == 1 else plural} {shown}"


def choose(steps: Sequence[int], *, step: int | None, first: bool, last: bool, warmup: int) -> int:
    """The batch to show: the one asked for, or one in the middle of those after warm-up. Raises `ConfigError`."""
    if sum((step is not None, first, last)) > 1:
        raise ConfigError("--step, --first and --last each choose the batch; give one")
    if step is not None:
        if step not in steps:
            raise ConfigError(f"batch {step} was not traced; there are spans of batches {steps[0]} to {steps[-1]}")
        return step
    if first:
        return steps[0]
    if last:
        return steps[-1]
    warm = [s for s in steps if s >= warmup] or list(steps)
    return warm[len(warm) // 2]


def choose_ranks(asked: str | None, there: Sequence[int]) -> tuple[int, ...]:
    """Of "0,2,4-7", or the first few. Raises `ConfigError`."""
    if asked is None:
        return tuple(there[:MOST_RANKS])
    found: list[int] = []
    for piece in asked.split(","):
        begin, dash, end = piece.strip().partition("-")
        try:
            found += range(int(begin), int(end if dash else begin) + 1)
        except ValueError:
            raise ConfigError(f"--ranks {asked}: '{piece}' is no rank; write them as 0,2,4-7") from None
    unknown = [rank for rank in found if rank not in there]
    if unknown or not found:
        raise ConfigError(f"--ranks {asked}: there are spans of ranks {there[0]} to {there[-1]}")
    return tuple(dict.fromkeys(found))


def parts_table(parts: TimeBreakdown, batch: int) -> Table:
    """Where the time of a batch went, mean over the ranks."""
    table = Table(title=f"Batch {batch}, mean over ranks", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in parts._asdict().items():
        table.add_row(name.replace("_", "-"), f"{seconds:.4f}", f"{seconds / parts.total:.1%}" if parts.total else "-")
    table.add_section()
    table.add_row("all", f"{parts.total:.4f}", "")
    return table


@documented("docs/trace.md")
def trace(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="Run folder, configuration file of a run, folder of predicted spans, or a record file of one run; "
            "default the newest run below runs/ where you stand."
        ),
    ] = None,
    *,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default the run's own folder.")] = None,
    step: Annotated[int | None, typer.Option(help="Batch to show; default one in the middle, after warm-up.")] = None,
    first: Annotated[bool, typer.Option("--first", help="Show the first batch.")] = False,
    last: Annotated[bool, typer.Option("--last", help="Show the last batch.")] = False,
    ranks: Annotated[
        str | None, typer.Option(help=f"Ranks to draw, as 0,2,4-7; default the first {MOST_RANKS}.")
    ] = None,
    from_ms: Annotated[float, typer.Option(help="Draw from here, in milliseconds of the batch.")] = 0.0,
    to_ms: Annotated[float | None, typer.Option(help="Draw up to here; default the end of the batch.")] = None,
    compress: Annotated[bool, typer.Option("--gzip", help="Write trace.json.gz, which Perfetto opens too.")] = False,
) -> None:
    """Draw when the ranks of a run computed, communicated and waited; write a trace for chrome://tracing or Perfetto.

    The trace has all batches, or the one that an option chooses; the picture one batch.
    """
    found = session_to_show(find_run(folder_of_run(run)), step=step, first=first)
    steps = load_steps(found, step)
    begin = found.sessions[0].first_batch if found.sessions else 0
    warmup = found.record.warmup_batches if found.record and found.record.warmup_batches is not None else 1
    batch = choose(list(steps), step=step, first=first, last=last, warmup=0 if len(steps) == 1 else begin + warmup)
    spans = steps[batch]
    there = sorted(found.files)
    drawn = choose_ranks(ranks, there)
    everything = whole(spans, ranks=drawn)
    end = everything.end if to_ms is None else min(everything.end, everything.begin + to_ms / 1e3)
    view = View(begin=everything.begin + from_ms / 1e3, end=end, ranks=drawn, zero=everything.begin)
    if not from_ms >= 0 or view.begin >= view.end:
        length = 1e3 * (everything.end - everything.begin)
        raise ConfigError(f"--from-ms {from_ms:g} --to-ms {to_ms}: batch {batch} goes from 0 to {length:.1f} ms")
    share = overlap(spans)
    hidden = (
        f"hidden of the collectives along row and col: {share.hidden_share:.0%} of {share.collective:.3g} s"
        if share.collective
        else "no collectives along row and col"
    )
    names = {rank: found.name(rank) for rank in there}
    several = len({s.microbatch for s in spans if s.microbatch >= 0}) > 1
    foot = (
        f"{len(drawn)} of {len(there)} ranks{'; numbers in bars: microbatch' if several else ''}\n"
        f"batch {batch}{f' of {min(steps)} to {max(steps)}' if len(steps) > 1 else ''}, all its ranks: {hidden}"
    )
    chosen = step is not None or first or last
    folder = out or found.folder
    file = folder / ("trace.json.gz" if compress else "trace.json")
    events = write_trace(
        file,
        spans if chosen else [span for own in steps.values() for span in own],
        names={rank: f"{name}, {found.kind}" for rank, name in names.items()},
        about={"run": found.folder.name, "kind": found.kind},
    )
    with style.styled("timeline"):
        title = f"{found.folder.name}: batch {batch}, {found.kind}"
        pictures = style.save(draw_timeline(spans, view, title=title, names=names, foot=foot), "timeline", folder)
    console.print(parts_table(breakdown(spans), batch))
    console.print(f"batch {batch}, {len(there)} rank(s): {hidden}", soft_wrap=True, highlight=False)
    known = found.record.overlap_s if found.record is not None else {}
    if known.get("collective"):
        mean = known["hidden"] / known["collective"]
        console.print(f"record of the run, batches after warm-up: {mean:.0%} hidden", soft_wrap=True)
    if len(drawn) < len(there) and ranks is None:
        console.print(f"drawn: the first {len(drawn)} of {len(there)} ranks; choose others with --ranks")
    console.print(f"picture: {escape(', '.join(map(from_here, pictures)))}", soft_wrap=True)
    console.print(
        f"trace: {escape(from_here(file))} ({events} events; open it in chrome://tracing or ui.perfetto.dev)",
        soft_wrap=True,
    )
