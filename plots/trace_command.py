"""The command `axonn trace`: a run's spans as a picture, as a trace file, and as the breakdown of a batch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
from plots.timeline_picture import MOST_RANKS, View, draw_timeline, full_view

_FOLDERS = "spans-*.parquet"
_MOST_MISSING = 1000
"""Ranks without spans that are counted."""
_RANK = re.compile(r"spans-([0-9]{1,7})\.parquet")


@dataclass(frozen=True, kw_only=True)
class TracedRun:
    """The spans of a run, its grid, its record and its sessions."""

    folder: Path
    files: dict[int, list[Path]]
    """Span files by rank; a prediction has a rank for each stage."""
    grid: ProcessGrid | None
    record: Record | None
    sessions: Sequence[PastSession] = ()
    """Sessions that have spans; those of a resumed run may differ in their grid."""

    def during(self, session: PastSession) -> TracedRun:
        """Return the spans of one session alone, with its grid."""
        grid = session.grid
        files = {rank: [p for p in paths if _in(session, p)] for rank, paths in self.files.items() if rank < grid.size}
        with_spans = {rank: paths for rank, paths in files.items() if paths}
        return replace(self, files=with_spans, grid=grid, sessions=[session])

    @property
    def kind(self) -> str:
        """Kind of the run's points; a run that is not over counts as measured, too."""
        return "measured" if self.record is None else self.record.kind

    @property
    def expected(self) -> int:
        """Number of ranks that should have spans."""
        if self.grid is None:
            return 1 + max(self.files)
        return self.grid.inter if self.kind == "predicted" else self.grid.size

    def name(self, rank: int) -> str:
        """Return the name of a rank, with its place in the grid."""
        if self.grid is None:
            return f"rank {rank}"
        if self.kind == "predicted":
            return f"stage {rank} of {self.grid.inter}" if self.grid.inter > 1 else "every GPU"
        place = self.grid.coordinates(rank)._asdict() if rank < self.grid.size else {}
        coordinates = ", ".join(f"{axis} {place[axis]}" for axis in AXES if place and self.grid.extent(axis) > 1)
        return f"rank {rank} ({coordinates})" if coordinates else f"rank {rank}"


def find_run(run: Path) -> TracedRun:
    """Return the spans of a run, which is named by its folder, that of predicted spans, or a record file of one run.

    Raises `RecordError` when there are no spans, naming what there is instead.
    """
    if run.is_file():
        run = _folder_of_records(run)
    if not run.is_dir():
        raise RecordError(f"{run}: there is no such run; {_near(run)}")
    by_rank = {int(match[1]): p for p in run.glob(_FOLDERS) if (match := _RANK.fullmatch(p.name))}
    files = {rank: span_files(path) if path.is_dir() else [path] for rank, path in sorted(by_rank.items())}
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
    all_files = [path for paths in files.values() for path in paths]
    sessions = [session for session in sessions_of(run) if any(_in(session, path) for path in all_files)]
    grid = sessions[-1].grid if sessions else None if record is None else record.ran.grid
    return TracedRun(
        folder=run,
        files=files,
        grid=grid,
        record=record,
        sessions=sessions,
    )


def _in(session: PastSession, file: Path) -> bool:
    """Return whether a file of spans is of this session: files begin with a session, and end at every checkpoint."""
    return session.has(int(file.stem)) if file.stem.isdecimal() else session.end is None


def session_to_show(run: TracedRun, *, step: int | None, first: bool) -> TracedRun:
    """Return the spans of the session that has the batch `step`, by default of the newest session."""
    if len(run.sessions) < 2:
        return run
    asked = None if step is None else session_of(run.sessions, step)
    chosen = asked or run.sessions[0 if first else -1]
    for session in run.sessions:
        if session is not chosen:
            end = f" to {session.end - 1}" if session.end is not None else " and on"
            console.print(
                f"not shown: batches {session.first_batch}{end}, of another start ({session.grid}); "
                "choose one with --step",
                soft_wrap=True,
                highlight=False,
            )
    return run.during(chosen)


def _folder_of_records(path: Path) -> Path:
    """Return the run folder that a record file names. Raises `RecordError` where it names none, or several."""
    folders = {r.run_folder for r in read_records(path) if r.run_folder}
    if not folders:
        raise RecordError(f"{path}: none of its records has a run folder, so there are no spans")
    if len(folders) > 1:
        raise RecordError(f"{path}: has several runs; name one of {', '.join(sorted(folders))}")
    named = Path(folders.pop())
    # A run that was moved still has its record in it.
    places = [path.parent] if any(path.parent.glob(_FOLDERS)) else [named, PROJECT / named]
    folder = next((place for place in places if place.exists()), named)
    # What is drawn is written into the folder, so a stranger's record must not choose it.
    known = any(folder.resolve().is_relative_to(place.resolve()) for place in (PROJECT, Path.cwd(), path.parent))
    if folder.is_dir() and not known and not (folder / "record.json").exists():
        raise RecordError(f"{path}: names {folder}, a folder outside of the project without record.json; name it")
    return folder


def _near(run: Path) -> str:
    """Return a hint on the folders that there are instead."""
    parent = run.parent if run.parent.is_dir() else RUNS
    names = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    near = get_close_matches(run.name, names, n=3)
    if near:
        return f"did you mean {' or '.join(str(parent / name) for name in near)}?"
    return f"in {parent} are {', '.join(names[:8]) or 'no folders'}{' and others' if len(names) > 8 else ''}"


def _record_of(folder: Path) -> Record | None:
    """Return the record of a finished run: its own, or the one in results/ that names the folder; otherwise None."""
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
    """Return the spans of the batches that all ranks have, by batch (with `step`: from the files that may have it).

    Warns of files that cannot be read, and of batches that some ranks have not written yet. Raises `RecordError` when
    there is no batch.
    """
    by_rank: dict[int, dict[int, list[Span]]] = {}
    unread = 0
    for rank, files in run.files.items():
        by_step = by_rank.setdefault(rank, {})
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
                by_step.setdefault(span.step, []).append(span)
    missing = list(islice((rank for rank in range(run.expected) if not by_rank.get(rank)), _MOST_MISSING))
    if unread and not any(by_rank.values()):
        raise RecordError(f"{run.folder}: none of its span files can be read; run it again with this version")
    if missing:
        raise RecordError(
            f"{run.folder}: {_listed(missing, 'rank')} of {run.expected} have no spans yet or lost them; "
            "let the run come to its next checkpoint, or to its end"
        )
    steps = set().union(*by_rank.values())
    complete_steps = sorted(set.intersection(*(set(by_step) for by_step in by_rank.values())))
    if len(complete_steps) < len(steps) and step is None:
        warn(
            f"not all ranks have spans of {_listed(sorted(steps - set(complete_steps)), 'batch')}: "
            "the run goes on, or was cut; they are left out"
        )
    if not complete_steps:
        raise RecordError(f"{run.folder}: there is no batch of which all ranks have spans")
    return {s: [span for by_step in by_rank.values() for span in by_step[s]] for s in complete_steps}


def _listed(numbers: Sequence[int], noun: str) -> str:
    """List some ranks or batches; of many the first."""
    shown = ", ".join(map(str, numbers[:6])) + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")
    plural = {"batch": "batches"}.get(noun, f"{noun}s")
    return f"{noun if len(numbers) == 1 else plural} {shown}"


def choose(steps: Sequence[int], *, step: int | None, first: bool, last: bool, warmup: int) -> int:
    """Return the batch to show: the chosen one, or one in the middle of those after warm-up. Raises `ConfigError`."""
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


def choose_ranks(asked: str | None, traced: Sequence[int]) -> tuple[int, ...]:
    """Parse ranks such as "0,2,4-7"; return the first few if none are given. Raises `ConfigError`."""
    if asked is None:
        return tuple(traced[:MOST_RANKS])
    chosen: list[int] = []
    for piece in asked.split(","):
        begin, dash, end = piece.strip().partition("-")
        try:
            chosen += range(int(begin), int(end if dash else begin) + 1)
        except ValueError:
            raise ConfigError(f"--ranks {asked}: '{piece}' is no rank; write them as 0,2,4-7") from None
    unknown = [rank for rank in chosen if rank not in traced]
    if unknown or not chosen:
        raise ConfigError(f"--ranks {asked}: there are spans of ranks {traced[0]} to {traced[-1]}")
    return tuple(dict.fromkeys(chosen))


def parts_table(parts: TimeBreakdown, batch: int) -> Table:
    """Return the table of how the time of a batch was spent, mean over the ranks."""
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
    traced = session_to_show(find_run(folder_of_run(run)), step=step, first=first)
    steps = load_steps(traced, step)
    batch = choose(list(steps), step=step, first=first, last=last, warmup=_warmup(traced, steps))
    spans = steps[batch]
    drawn = choose_ranks(ranks, sorted(traced.files))
    view = _window(spans, drawn, batch=batch, from_ms=from_ms, to_ms=to_ms)
    folder = out or traced.folder
    file = folder / ("trace.json.gz" if compress else "trace.json")
    one_batch = step is not None or first or last
    events = write_trace(
        file,
        spans if one_batch else [span for spans_of_batch in steps.values() for span in spans_of_batch],
        names={rank: f"{traced.name(rank)}, {traced.kind}" for rank in sorted(traced.files)},
        about={"run": traced.folder.name, "kind": traced.kind},
    )
    pictures = _draw(traced, spans, view, batch=batch, batches=list(steps), folder=folder)
    _print_batch(traced, spans, batch)
    if len(drawn) < len(traced.files) and ranks is None:
        console.print(f"drawn: the first {len(drawn)} of {len(traced.files)} ranks; choose others with --ranks")
    console.print(f"picture: {escape(', '.join(map(from_here, pictures)))}", soft_wrap=True)
    console.print(
        f"trace: {escape(from_here(file))} ({events} events; open it in chrome://tracing or ui.perfetto.dev)",
        soft_wrap=True,
    )


def _warmup(traced: TracedRun, steps: Mapping[int, Sequence[Span]]) -> int:
    """Return the first batch after warm-up; 0 where there is only one batch to show."""
    if len(steps) == 1:
        return 0
    begin = traced.sessions[0].first_batch if traced.sessions else 0
    recorded = None if traced.record is None else traced.record.warmup_batches
    return begin + (1 if recorded is None else recorded)


def _window(spans: Sequence[Span], ranks: tuple[int, ...], *, batch: int, from_ms: float, to_ms: float | None) -> View:
    """Return the window of a batch between two times in milliseconds. Raises `ConfigError` where it is empty."""
    batch_view = full_view(spans, ranks=ranks)
    end = batch_view.end if to_ms is None else min(batch_view.end, batch_view.begin + to_ms / 1e3)
    view = View(begin=batch_view.begin + from_ms / 1e3, end=end, ranks=ranks, zero=batch_view.begin)
    if not from_ms >= 0 or view.begin >= view.end:
        length = 1e3 * (batch_view.end - batch_view.begin)
        raise ConfigError(f"--from-ms {from_ms:g} --to-ms {to_ms}: batch {batch} goes from 0 to {length:.1f} ms")
    return view


def _draw(
    traced: TracedRun, spans: Sequence[Span], view: View, *, batch: int, batches: Sequence[int], folder: Path
) -> list[Path]:
    """Draw a batch, one of `batches`, and return the pictures' files."""
    several = len({s.microbatch for s in spans if s.microbatch >= 0}) > 1
    foot = (
        f"{len(view.ranks)} of {len(traced.files)} ranks{'; numbers in bars: microbatch' if several else ''}\n"
        f"batch {batch}{f' of {min(batches)} to {max(batches)}' if len(batches) > 1 else ''}, all its ranks: "
        f"{_hidden(spans)}"
    )
    names = {rank: traced.name(rank) for rank in traced.files}
    with style.styled("timeline"):
        title = f"{traced.folder.name}: batch {batch}, {traced.kind}"
        return style.save(draw_timeline(spans, view, title=title, names=names, foot=foot), "timeline", folder)


def _hidden(spans: Sequence[Span]) -> str:
    """Describe how much of the collectives of the tensor axes ran under compute."""
    share = overlap(spans)
    if not share.collective:
        return "no collectives along row and col"
    return f"hidden of the collectives along row and col: {share.hidden_share:.0%} of {share.collective:.3g} s"


def _print_batch(traced: TracedRun, spans: Sequence[Span], batch: int) -> None:
    """Print the breakdown of a batch, and what of its collectives is hidden, beside the run's mean."""
    console.print(parts_table(breakdown(spans), batch))
    console.print(f"batch {batch}, {len(traced.files)} rank(s): {_hidden(spans)}", soft_wrap=True, highlight=False)
    recorded = traced.record.overlap_s if traced.record is not None else {}
    if recorded.get("collective"):
        mean = recorded["hidden"] / recorded["collective"]
        console.print(f"record of the run, batches after warm-up: {mean:.0%} hidden", soft_wrap=True)
