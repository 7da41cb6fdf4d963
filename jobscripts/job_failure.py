"""Causes of a job's end: from the scheduler, from its script, and from what its ranks printed."""

from __future__ import annotations

import time
from pathlib import Path

from axonn.durable_files import read_json
from axonn.observability.records import Failure
from jobscripts.attempts import ENDED, attempt_of
from jobscripts.schedulers import State
from jobscripts.submission import Standing

FRESH_S = 120.0
"""Seconds for which a job with fresh files counts as running, where nobody reports its end."""
_KNOWN: dict[State, Failure] = {
    "timed-out": Failure(cause="timeout", detail="the job reached its wall limit"),
    "out-of-memory": Failure(cause="out-of-memory", detail="the scheduler ended the job for its memory"),
    "node-failure": Failure(cause="dead-rank", detail="a node of the job failed"),
    "cancelled": Failure(cause="interrupted", detail="the job was cancelled"),
}
_AGAIN = "hand it in again with axonn submit"
_HINTS = {
    "timeout": f"{_AGAIN}, or raise wall_time in the site file and write the jobs anew",
    "out-of-memory": "lower microbatch_size, or cut the model over more ranks",
    "nan": "lower the learning rate, or train in another precision",
    "dead-rank": _AGAIN,
    "interrupted": _AGAIN,
}


def not_yet(standing: Standing) -> str | None:
    """Return why a job has no record yet; None for one that ended."""
    if standing.live:
        return "waits" if standing.state == "waiting" else "runs"
    started = standing.attempt is not None and (standing.id is None or attempt_of(standing.id, standing.attempt))
    if standing.unclear and not (started and standing.reason is not None):
        if not started or _fresh(standing.attempt):
            return f"may still wait or run as job {standing.id}: the scheduler does not answer ({standing.silence})"
        return None
    if standing.attempt is None and standing.state == "unknown":
        if standing.id is None:
            return "was not submitted"
        return f"was submitted as job {standing.id}, which the scheduler does not know, and left nothing; {_AGAIN}"
    if standing.state == "unknown" and standing.reason is None and _fresh(standing.attempt):
        return "runs, as its files say"
    return None


def _fresh(attempt: Path | None) -> bool:
    """Return whether something in the folders of a run was written a moment ago, and nothing reports its end."""
    if attempt is None or (attempt / ENDED).exists():
        return False
    paths = [*attempt.iterdir(), *attempt.parent.glob("rank-*.alive"), *attempt.parent.glob("*.jsonl")]
    return any(time.time() - path.stat().st_mtime < FRESH_S for path in paths)


def failure_of_job(standing: Standing, printed: Failure | None, *, done: int, steps: int, job: Path) -> Failure:
    """Return the failure of a job that ended without all its batches. `printed`: the failure that its ranks printed.

    The scheduler's cause takes precedence over what the ranks printed when they were ended; out of memory and
    non-finite losses, which only the ranks know, take precedence over the scheduler's.
    """
    attempt = _own_attempt(standing)
    if attempt is None and standing.state != "unknown":
        # The output of an earlier job is not the cause of this one's end.
        printed = None
    known = _KNOWN.get(_known_end(standing))
    failure = printed if printed is not None and (known is None or printed.cause in ("out-of-memory", "nan")) else known
    if failure is None:
        failure = Failure(cause="error", detail=_end_of(standing))
    if failure.cause == "error" and attempt is None:
        hint = f"what the scheduler wrote into {job} may say why"
    else:
        output = f"{job}/run/{attempt.name if attempt else 'attempt-*'}/output.txt"
        hint = _HINTS.get(failure.cause) or f"what it printed is in {output}"
    batches = f"{done} of {steps} batches are done"
    return failure.model_copy(update={"detail": f"{failure.detail.rstrip('.; ')}; {batches}; {hint}"})


def _own_attempt(standing: Standing) -> Path | None:
    """Return the newest attempt, unless it belongs to an earlier job."""
    return standing.attempt if standing.id is None or attempt_of(standing.id, standing.attempt) else None


def _known_end(standing: Standing) -> State:
    """Return the state in which a job ended.

    A script that is being ended reports "cancelled", whatever ended it: the scheduler may know more, or nothing.
    """
    if standing.reason == "wall-limit":
        return "timed-out"
    if standing.reason == "cancelled" and standing.state not in ("timed-out", "out-of-memory", "node-failure"):
        return "cancelled"
    return standing.state


def _end_of(standing: Standing) -> str:
    """Return the end of a job as text, where neither the scheduler nor the ranks report a cause."""
    attempt = _own_attempt(standing)
    if attempt is None:
        return "the job ended before it started anything"
    path = attempt / ENDED
    if not path.exists():
        return "the job ended without a word, as when it is killed or its node fails"
    try:
        return f"the job ended with exit status {int(read_json(path)['status'])}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return f"the job ended, and {path} is cut short"
