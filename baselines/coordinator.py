"""Turn-taking of jobs: all are started at once and train batches one after the other, so that the machine's drift hits
all of them alike.

A job is one contender's ranks. Each job trains one batch to warm up, and then rounds alternate in order and in reversed
order: in a round every job trains one batch under every condition.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

from axonn.config.loading import Loss
from axonn.config.train_config import StrictModel, TrainConfig
from axonn.observability.batch_usage import batch_usage
from axonn.observability.machine_usage import BatchUsage
from axonn.observability.procfs import available_cores
from axonn.observability.records import Failure
from axonn.training.metrics import BATCHES, Tail
from axonn.training.run_outcome import Outcome
from axonn.training.supervision.supervisor import supervise
from axonn.training.supervision.turn_taking import TurnTaking
from baselines.contenders import Device
from baselines.rounds import LOOPBACK, Condition, Turn, Widest, turn_order, widest

LEAST_ROUNDS = 4
"""Fewest rounds: together with the warm-up batch they yield as many losses as are compared."""
_POLL_S = 0.2
_START_S = 900.0
"""Seconds for starting: frameworks build their operators at first use, all at once, on few cores."""
_LEAST_TURN_S, _TURN_TIMES_WARM_UP = 120.0, 30.0
_END_S = 120.0


Stopped = Literal["converged", "minutes", "rounds", "interrupted"]
"""Reason for which no more rounds are made: every interval is narrow enough, the time is spent, the requested number is
reached, or the comparison was interrupted."""


class ContenderResult(StrictModel):
    """Measurements of one contender."""

    turns: list[Turn] = []
    """Turns after the warm-up batch."""
    losses: list[Loss] = []
    """Losses of all batches, the warm-up one first."""
    memory_bytes: int | None = None
    bytes_per_batch: dict[str, int] = {}
    stopped: Stopped | None = None
    failure: Failure | None = None


class LostJob(Exception):
    """A job that cannot go on; its outcome says why."""


class RankJob(Protocol):
    """Ranks that train one batch per turn."""

    key: str

    def start(self) -> None: ...

    def turn(self, timeout_s: float) -> float:
        """Train one batch and return its seconds. Raises `LostJob` when the job has died or takes too long."""
        ...

    def usage(self) -> Sequence[BatchUsage]:
        """Return the processor usage of the batches so far, the warm-up one first, as far as all ranks have reported
        it."""
        ...

    def end(self, failure: Failure | None = None) -> Outcome:
        """Let the job come to its end, or end it with this failure."""
        ...


class RanksJob:
    """A framework's ranks under their supervisor, in a thread."""

    def __init__(
        self, key: str, framework: str, config: TrainConfig, folder: Path, *, link_only: bool, device: Device
    ) -> None:
        self.key = key
        self._framework = framework
        self._config = config
        self._folder = folder
        self._ranks = config.grid.size
        self._link_only = link_only
        self._device: Device = device
        self._outcome = Outcome()
        self._given_up: Failure | None = None
        self._rows = Tail(folder / BATCHES)
        self._done = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._turns = TurnTaking(self._folder, self._ranks)
        self._thread = threading.Thread(target=self._run, name=self.key, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = supervise(
                self._framework,
                self._config,
                self._folder,
                timeout_s=float("inf"),
                give_up=lambda: self._given_up,
                turns=True,
                own_cores=self._ranks <= available_cores(),
                link_only=self._link_only,
                device=self._device,
            )
        except Exception as error:
            # Any error of an adapter that prepares its files ends this job, not the comparison.
            self._outcome = Outcome(failure=Failure(cause="error", detail=f"{type(error).__name__}: {error}"))

    def turn(self, timeout_s: float) -> float:
        self._turns.grant()
        assert self._thread is not None
        deadline = time.monotonic() + timeout_s
        while not self._turns.finished(_POLL_S):
            if not self._thread.is_alive():
                raise LostJob
            if time.monotonic() > deadline:
                self._given_up = Failure(cause="timeout", detail=f"a batch was not finished after {timeout_s:.0f} s")
                raise LostJob
        self._done += 1
        return float(self._rows.new()[-1]["seconds"])

    def usage(self) -> Sequence[BatchUsage]:
        return batch_usage(self._folder, self._ranks, self._done)

    def end(self, failure: Failure | None = None) -> Outcome:
        if self._thread is None:
            return Outcome(failure=failure)
        if failure is not None:
            self._given_up = self._given_up or failure
        else:
            self._turns.end()
        self._thread.join(_END_S)
        if self._thread.is_alive():
            self._given_up = Failure(cause="timeout", detail=f"did not end within {_END_S:.0f} s after its last batch")
            self._thread.join()
        self._turns.close()
        return self._outcome


class LinkCondition(Protocol):
    """The network between the ranks."""

    def apply(self, condition: Condition) -> None: ...

    def sent(self) -> int | None:
        """Return the bytes that crossed it so far; None where they cannot be counted."""
        ...


class PlainLoopback:
    """The machine's loopback: it has no rate to set, and other processes' bytes cross it too."""

    def apply(self, condition: Condition) -> None:
        assert condition.kbit is None, "a rate needs an emulated link"

    def sent(self) -> int | None:
        return None


class JobGroup(StrictModel):
    """Options of `take_turns` for a group of jobs."""

    number: int = 0
    conditions: list[Condition] = [LOOPBACK]
    least_rounds: int = LEAST_ROUNDS
    most_rounds: int = 100
    seconds: float
    """Seconds in which as many rounds are made as fit, starting included, but never fewer than `least_rounds`."""
    ours: list[str] = []
    """Keys of our contenders; ratios are made to the fastest of them."""
    half_width: float | None = None
    """Interval width at which no more rounds are made (`baselines.statistics.HALF_WIDTH`): no ratio's is wider. None:
    all rounds are made."""
    with_busy: bool = False
    """True if batches of a busy machine count in ratios."""


Say = Callable[[str, int, int, Widest | None], None]
"""Callback with the current activity, the rounds that are done, those that are planned, and the widest interval."""


def take_turns(
    group: JobGroup,
    jobs: Sequence[RankJob],
    *,
    link: LinkCondition,
    say: Say,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, ContenderResult], bool]:
    """Run rounds of `jobs`. Returns the result of each by its key, and whether it was interrupted.

    A job that dies or hangs leaves with its failure; the others go on.
    """
    rounds = _GroupRounds(group, jobs, link=link, say=say, clock=clock)
    interrupted = False
    stopped: Stopped
    try:
        rounds.start()
        stopped = rounds.run()
    except KeyboardInterrupt:
        interrupted, stopped = True, "interrupted"
    except BaseException as error:
        rounds.end(Failure(cause="error", detail=f"the comparison failed: {error}"))
        raise
    say("ending", 0, 0, rounds.widest)
    rounds.end(Failure(cause="interrupted", detail="the comparison was interrupted") if interrupted else None)
    return rounds.results(stopped), interrupted


class _GroupRounds:
    """The jobs of a group that still run, and the turns that they have taken."""

    def __init__(
        self,
        group: JobGroup,
        jobs: Sequence[RankJob],
        *,
        link: LinkCondition,
        say: Say,
        clock: Callable[[], float],
    ) -> None:
        self._group = group
        self._link = link
        self._say = say
        self._clock = clock
        self._running = {job.key: job for job in jobs}
        self._turns: dict[str, list[Turn]] = {job.key: [] for job in jobs}
        self._outcomes: dict[str, Outcome] = {}
        self._limits = {job.key: _START_S for job in jobs}
        self._began = clock()
        self.widest: Widest | None = None

    def start(self) -> None:
        """Start all jobs, and let each train one batch to warm up."""
        self._link.apply(LOOPBACK)
        for job in self._running.values():
            job.start()
        for key in list(self._running):
            self._say(f"warm-up: {key}", 0, 0, None)
            if (seconds := self._batch(key)) is not None:
                self._limits[key] = max(_LEAST_TURN_S, _TURN_TIMES_WARM_UP * seconds)

    def run(self) -> Stopped:
        """Run as many rounds as the group asks for. Returns why there are no more."""
        group, began = self._group, self._clock()
        number, planned = 0, group.least_rounds
        stopped: Stopped = "minutes"
        while self._running and number < planned and stopped != "converged":
            self._round(number, planned)
            number += 1
            planned = self._planned(number, (self._clock() - began) / number)
            self._turns |= {key: _with_usage(self._turns[key], job.usage()) for key, job in self._running.items()}
            turns = {key: self._turns[key] for key in self._running}
            self.widest = widest(turns, group.ours, with_busy=group.with_busy)
            if number >= group.least_rounds and self._is_narrow():
                stopped = "converged"
            elif number >= group.most_rounds:
                stopped = "rounds"
        self._link.apply(LOOPBACK)
        return stopped

    def _round(self, number: int, planned: int) -> None:
        for condition in self._group.conditions:
            self._link.apply(condition)
            for key in turn_order(list(self._running), number):
                self._say(key, number, planned, self.widest)
                before = self._link.sent()
                if (seconds := self._batch(key)) is not None:
                    after = self._link.sent()
                    self._turns[key].append(
                        Turn(
                            condition=condition.name,
                            group=self._group.number,
                            round=number,
                            seconds=seconds,
                            link_bytes=None if before is None or after is None else after - before,
                        )
                    )

    def _batch(self, key: str) -> float | None:
        """Let a job train one batch and return its seconds; None where it is lost."""
        try:
            return self._running[key].turn(self._limits[key])
        except LostJob:
            self._say(f"{key} has failed", -1, -1, None)
            self._outcomes[key] = self._running.pop(key).end(Failure(cause="error", detail="ended after it failed"))
            return None

    def _planned(self, number: int, round_s: float) -> int:
        """Return how many rounds there will be, after `number` rounds of `round_s` seconds."""
        group = self._group
        fitting = group.most_rounds
        if round_s > 0:
            fitting = number + int((self._began + group.seconds - self._clock()) / round_s)
        return min(max(fitting, group.least_rounds, number), group.most_rounds)

    def _is_narrow(self) -> bool:
        limit = self._group.half_width
        return self.widest is not None and limit is not None and self.widest.half_width <= limit

    def end(self, failure: Failure | None) -> None:
        """End all jobs at once, since each may take seconds."""
        if not self._running:
            return
        with ThreadPoolExecutor(len(self._running)) as pool:
            ends = {key: pool.submit(job.end, failure) for key, job in self._running.items()}
            self._outcomes |= {key: end.result() for key, end in ends.items()}

    def results(self, stopped: Stopped) -> dict[str, ContenderResult]:
        """Return the measurements of every job that has ended."""
        return {
            key: _measured(self._outcomes[key], turns, stopped)
            for key, turns in self._turns.items()
            if key in self._outcomes
        }


def _with_usage(turns: Sequence[Turn], usage: Sequence[BatchUsage]) -> list[Turn]:
    """Return the turns with their processor usage, where it is known; `usage` begins with the warm-up batch."""
    known = dict(enumerate(usage[1:]))
    return [turn if i not in known else turn.model_copy(update={"usage": known[i]}) for i, turn in enumerate(turns)]


def _measured(outcome: Outcome, turns: Sequence[Turn], stopped: Stopped) -> ContenderResult:
    failure = outcome.failure
    if failure is not None and failure.cause == "interrupted" and len({t.round for t in turns}) >= LEAST_ROUNDS:
        # Measurements from before the interruption count.
        failure = None
    return ContenderResult(
        turns=_with_usage(turns, outcome.usage),
        stopped=stopped,
        losses=outcome.losses,
        memory_bytes=outcome.memory_bytes,
        bytes_per_batch=outcome.bytes_per_batch,
        failure=failure,
    )


def keep_little(folder: Path) -> None:
    """Delete all files of a run that succeeded but its specification, its batches and its log."""
    for path in folder.iterdir():
        if path.name in ("spec.json", "batches.jsonl", "log.txt"):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
