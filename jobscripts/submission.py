"""Submission of jobs, and their states: by the scheduler, and by the files in their folders."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from axonn.config.loading import first_of
from axonn.durable_files import LOCK, locked, read_json, replace_durably
from axonn.errors import LaunchError, RecordError
from jobscripts.attempts import all_done, attempt_of, attempts, id_of, newest_attempt, reason_of
from jobscripts.generate import MANIFEST, JobEntry, Manifest, changed_files, load_manifest
from jobscripts.schedulers import Scheduler, State, Status, load_scheduler

SUBMITTED = "submitted.json"
"""Ids of every job that was submitted, by its name, the newest last."""
_IDS = TypeAdapter(dict[str, list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]]])
"""Pattern of ids: none can be taken for an option of the command that it is passed to."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """State of a job. `attempt`: folder of its newest one; `reason`: how that ended, in its own words.

    `status`: the scheduler's report, if it knew the job. `silence`: why it did not answer. `all_done`: our own ranks
    did every batch.
    """

    entry: JobEntry
    id: str | None
    state: State
    attempt: Path | None
    reason: str | None
    status: Status | None = None
    silence: str | None = None
    all_done: bool = False

    @property
    def finished(self) -> bool:
        """True if there is nothing left to do, whatever happened after the last batch."""
        return self.reason == "finished" or self.all_done

    @property
    def live(self) -> bool:
        """True if it waits or runs."""
        return self.state in ("waiting", "running")

    @property
    def failed(self) -> bool:
        """True if it was submitted, came to an end, and is not complete."""
        return self.id is not None and not self.live and not self.finished and not self.unclear

    @property
    def unclear(self) -> bool:
        """True if it may still wait or run: the scheduler does not answer."""
        return self.id is not None and self.silence is not None and self.state == "unknown"


@dataclass(frozen=True)
class _Answer:
    """The scheduler's answer about jobs. `silence`: why it did not answer."""

    states: dict[str, Status] = field(default_factory=dict)
    silence: str | None = None


def to_submit(folder: Path, *, only: Sequence[str] = (), again: bool = False) -> list[str]:
    """Return the names of jobs that have not finished, do not wait and do not run.

    Raises `LaunchError` where that cannot be known, and for a job that was changed since it was written.
    """
    manifest = load_manifest(folder)
    _check_names(manifest, only)
    names = []
    for standing in standings(folder):
        entry = standing.entry
        if (only and entry.name not in only) or standing.live or (standing.finished and not again):
            continue
        if standing.unclear:
            raise LaunchError(
                f"{entry.name} may still wait or run as job {standing.id}, and the scheduler does not answer "
                f"({standing.silence}); submit when it does"
            )
        if changed := changed_files(folder, entry.files | manifest.files):
            raise LaunchError(f"{folder / changed[0]} was changed since axonn jobs wrote it; write the jobs anew")
        names.append(entry.name)
    return names


def submit(
    folder: Path,
    *,
    only: Sequence[str] = (),
    again: bool = False,
    on_job: Callable[[str, str], None] = lambda name, job: None,
) -> list[tuple[str, str]]:
    """Submit every job that has not finished, is not waiting and does not run. Returns (name, id) of each.

    `only`: names of jobs; `again`: finished ones, too; `on_job` is called with name and id of each as soon as it is
    recorded. Raises `LaunchError` when the scheduler refuses one, after recording those submitted before it, and
    `RecordError` for a folder that axonn jobs did not write.
    """
    with _alone(folder):
        return _submit(folder, only=only, again=again, on_job=on_job)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raise `LaunchError` while another axonn submit submits jobs of this folder."""
    load_manifest(folder)
    # The lock is on the manifest itself: axonn jobs refuses a folder with other files.
    with locked(folder / MANIFEST, f"another axonn submit is at work in {folder}; wait for its end"):
        yield


def _submit(
    folder: Path, *, only: Sequence[str], again: bool, on_job: Callable[[str, str], None]
) -> list[tuple[str, str]]:
    scheduler = load_scheduler(load_manifest(folder).scheduler)
    names = to_submit(folder, only=only, again=again)
    done: list[tuple[str, str]] = []
    ended = {one.entry.name for one in standings(folder) if one.finished} if again else set()
    for name in names:
        aside = None
        try:
            aside = _put_aside(folder / name / "run") if name in ended else None
            job = _hand_in(scheduler, folder / name)
        except LaunchError as error:
            if aside is not None and not (folder / name / "run").exists():
                aside.rename(folder / name / "run")
            left = len(names) - len(done)
            recorded = f"; {len(done)} submitted before it are remembered" if done else ""
            raise LaunchError(
                f"{error}{recorded}; {left} not submitted: axonn submit {folder} goes on from here"
            ) from error
        # Read again: another axonn submit may have written it.
        ids = submitted(folder)
        ids.setdefault(name, []).append(job)
        replace_durably(folder / SUBMITTED, json.dumps(ids, indent=1) + "\n")
        done.append((name, job))
        on_job(name, job)
    return done


def _check_names(manifest: Manifest, only: Sequence[str]) -> None:
    known = [entry.name for entry in manifest.jobs]
    if unknown := [name for name in only if name not in known]:
        raise LaunchError(f"there is no job {', '.join(unknown)}; there are {', '.join(known)}")


def _put_aside(run: Path) -> Path | None:
    """Rename a finished run's folder, so that the job begins anew.

    Raises `LaunchError` while a start, perhaps one by hand, is at work in it.
    """
    if not run.exists():
        return None
    if (run / LOCK).exists():
        with locked(run / LOCK, f"a start of this job still runs in {run}; wait for its end, or cancel it"):
            pass
    number = 1
    while (path := run.with_name(f"run-{number}")).exists():
        number += 1
    return run.rename(path)


def _hand_in(scheduler: Scheduler, folder: Path) -> str:
    """Submit a job and return its id. Raises `LaunchError` when it was not accepted."""
    command = scheduler.submit("job.sh")
    before = attempts(folder)
    try:
        with open(folder / "job.sh" if scheduler.reads_script else os.devnull, "rb") as script:
            result = subprocess.run(command, cwd=folder, stdin=script, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LaunchError(
            f"{command[0]} cannot be started: {error}; is this a node where jobs are submitted?"
        ) from error
    message = (result.stderr or result.stdout).strip() or f"exit status {result.returncode}"
    if scheduler.runs_at_once:
        new = [path for path in attempts(folder) if path not in before]
        if not new:
            raise LaunchError(f"{folder.name} did not start: {message}")
        return id_of(new[-1])
    if result.returncode:
        raise LaunchError(f"{folder.name} was not taken: {message}")
    try:
        return scheduler.job_id(result.stdout)
    except LaunchError as error:
        look = scheduler.ask(["0"])[0][0]
        raise LaunchError(
            f"{error}; its exit status is 0, so {folder.name} may have been taken: look for it with {look}, and "
            "cancel it before submitting again"
        ) from error


def submitted(folder: Path) -> dict[str, list[str]]:
    """Return the ids that `submit` recorded. Raises `RecordError` for a file that is not its own."""
    path = folder / SUBMITTED
    if not path.exists():
        return {}
    try:
        return _IDS.validate_python(read_json(path))
    except (OSError, ValueError) as error:
        reason = first_of(error) if isinstance(error, ValidationError) else str(error)
        raise RecordError(
            f"{path}: is not what axonn submit wrote ({reason}); remove it when no job of this folder waits or runs"
        ) from error


def standings(folder: Path) -> list[Standing]:
    """Return the state of every job. Raises `RecordError` for a folder that axonn jobs did not write."""
    manifest = load_manifest(folder)
    remembered = submitted(folder)
    candidates = {e.name: _candidates(folder / e.name, remembered.get(e.name, [])) for e in manifest.jobs}
    answer = _asked(load_scheduler(manifest.scheduler), sorted({job for jobs in candidates.values() for job in jobs}))
    return [_standing(folder, entry, candidates[entry.name], answer) for entry in manifest.jobs]


def _candidates(job: Path, remembered: Sequence[str]) -> list[str]:
    """Return ids of what may be a job's current run: the last that was submitted, then what was started by hand."""
    strays = [id_of(path) for path in attempts(job) if id_of(path) not in remembered]
    return [*remembered[-1:], *strays[-1:]]


def _standing(folder: Path, entry: JobEntry, ids: Sequence[str], answer: _Answer) -> Standing:
    known = [job for job in ids if job in answer.states]
    lives = [job for job in known if answer.states[job].state in ("waiting", "running")]
    job = next(iter([*lives, *ids]), None)
    status = None if job is None else answer.states.get(job)
    attempt = newest_attempt(folder / entry.name)
    if of_job := [path for path in attempts(folder / entry.name) if id_of(path) == job]:
        attempt = of_job[-1]
    # An earlier job's reason does not hold for this one, which may have ended before it started.
    reason = reason_of(attempt) if job is None or attempt_of(job, attempt) else None
    state: State = "unknown" if status is None else status.state
    if job is None or attempt_of(job, attempt):
        state = _agreed(state, reason)
    return Standing(
        entry=entry,
        id=job,
        state=state,
        attempt=attempt,
        reason=reason,
        status=status,
        silence=answer.silence,
        all_done=all_done(folder / entry.name),
    )


def _agreed(state: State, reason: str | None) -> State:
    """Return the state of a job whose own script reports how it ended; only the script knows whether a run is
    complete."""
    if reason == "finished":
        return "done"
    if reason == "wall-limit" and state != "out-of-memory":
        return "timed-out"
    # The script of a job that is being ended fails; the scheduler knows why.
    if reason is None or state not in ("unknown", "done", "failed"):
        return state
    return "cancelled" if reason == "cancelled" else "failed"


def _asked(scheduler: Scheduler, ids: Sequence[str]) -> _Answer:
    """Return the scheduler's answer; empty where it is not at hand, as when results were copied elsewhere."""
    states: dict[str, Status] = {}
    silence = None
    for number in range(len(scheduler.ask(ids))):
        missing = [job for job in ids if job not in states]
        if not missing:
            break
        command = scheduler.ask(missing)[number]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            states |= {job: status for job, status in scheduler.states(result.stdout).items() if job in missing}
            message = (result.stderr or result.stdout).strip()
            answered = result.returncode == 0 or scheduler.unknown_job in message
        except OSError as error:
            answered, message = False, f"{command[0]} cannot be started: {error.strerror}"
        # The first command knows every live job: a second one that fails cannot cause a job to run twice.
        if number == 0 and not answered:
            silence = message.splitlines()[-1] if message else f"{command[0]} failed"
    return _Answer(states=states, silence=silence)
