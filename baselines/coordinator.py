"""Lets jobs that are all there at once train batches in turn, so that the machine's drift hits all alike.

A job is one contender's ranks. They are started together, each trains one batch to warm up, and then rounds alternate
in order and in reversed order: in a round every job trains one batch under every condition.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

from axonn.config import StrictModel, TrainConfig
from axonn.grid import ProcessGrid
from axonn.records import Failure
from axonn.strict import Loss
from axonn.usage import BatchUsage
from baselines.contenders import Device
from baselines.rounds import LOOPBACK, Condition, Turn, Widest, still_racing, widest
from experiments.batch_usage import batch_usage
from experiments.definition import available_cores
from experiments.metrics import BATCHES, Tail
from experiments.outcome import Outcome
from experiments.supervisor import supervise
from experiments.turns import TurnTaking

LEAST_ROUNDS = 4
"""With the batch that warms up, as many losses as are compared."""
_POLL_S = 0.2
_START_S = 900.0
"""Frameworks that build their operators at first use, all at once, on few cores."""
_LEAST_TURN_S, _TURN_TIMES_WARM_UP = 120.0, 30.0
_END_S = 120.0


Stopped = Literal["converged", "minutes", "rounds", "interrupted"]
"""Why no more rounds were made: every interval is narrow enough, the time is spent, as many as were to be, or somebody
said so."""


class Measured(StrictModel):
    """What came of one contender."""

    turns: list[Turn] = []
    """The warm-up batch left out."""
    losses: list[Loss] = []
    """Of all batches, the warm-up one first."""
    memory_bytes: int | None = None
    bytes_per_batch: dict[str, int] = {}
    stopped: Stopped | None = None
    failure: Failure | None = None


class Lost(Exception):
    """A job that cannot go on; its outcome says why."""


class Job(Protocol):
    """Ranks that train a batch when they are told to."""

    key: str

    def start(self) -> None: ...

    def turn(self, timeout_s: float) -> float:
        """Train one batch; the seconds that it took. Raises `Lost` when the job has died or takes too long."""
        ...

    def usage(self) -> Sequence[BatchUsage]:
        """What the processors did in the batches so far, the warm-up one first, as far as all ranks have said it."""
        ...

    def end(self, failure: Failure | None = None) -> Outcome:
        """Let it come to its end, or end it with this failure."""
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
        self._ranks = ProcessGrid(**config.grid.model_dump()).size
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
            # Whatever an adapter raises while it prepares its files ends this job, not the comparison.
            self._outcome = Outcome(failure=Failure(cause="error", detail=f"{type(error).__name__}: {error}"))

    def turn(self, timeout_s: float) -> float:
        self._turns.grant()
        assert self._thread is not None
        deadline = time.monotonic() + timeout_s
        while not self._turns.finished(_POLL_S):
            if not self._thread.is_alive():
                raise Lost
            if time.monotonic() > deadline:
                self._given_up = Failure(cause="timeout", detail=f"a batch was not finished after {timeout_s:.0f} s")
                raise Lost
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


class Link(Protocol):
    """What is between the ranks."""

    def apply(self, condition: Condition) -> None: ...

    def sent(self) -> int | None:
        """Bytes that crossed it so far; None where that cannot be told."""
        ...


class PlainLoopback:
    """Nothing to set, and others' bytes cross it too."""

    def apply(self, condition: Condition) -> None:
        assert condition.kbit is None, "a rate needs an emulated link"

    def sent(self) -> int | None:
        return None


class Group(StrictModel):
    """What `take_turns` is to do with some jobs."""

    number: int = 0
    conditions: list[Condition] = [LOOPBACK]
    least_rounds: int = LEAST_ROUNDS
    most_rounds: int = 100
    seconds: float
    """In which as many rounds are made as fit, starting included, but never less than `least_rounds`."""
    ours: list[str] = []
    """Keys of our contenders, to the fastest of which ratios are made."""
    half_width: float | None = None
    """No more rounds are made when no interval of a ratio is wider (`baselines.paired.HALF_WIDTH`); None: all are."""
    with_busy: bool = False
    """Whether batches of a busy machine take part in ratios."""


Say = Callable[[str, int, int, Widest | None], None]
"""Hears what is under way, the rounds that are done and those that there will be, and the widest interval."""


def take_turns(
    group: Group, jobs: Sequence[Job], *, link: Link, say: Say, clock: Callable[[], float] = time.monotonic
) -> tuple[dict[str, Measured], bool]:
    """Rounds of `jobs`; what came of each by its key, and whether it was interrupted.

    A job that dies or hangs leaves with its failure, the others go on; one that is clearly slower than the fastest of
    its side is given no further rounds.
    """
    running = {job.key: job for job in jobs}
    turns: dict[str, list[Turn]] = {job.key: [] for job in jobs}
    outcomes: dict[str, Outcome] = {}
    limits = {job.key: _START_S for job in jobs}
    began = clock()

    def one(key: str) -> float | None:
        try:
            return running[key].turn(limits[key])
        except Lost:
            say(f"{key} has failed", -1, -1, None)
            outcomes[key] = running.pop(key).end(Failure(cause="error", detail="ended after it failed"))
            return None

    interrupted, wide = False, None
    stopped: Stopped = "minutes"
    try:
        link.apply(LOOPBACK)
        for job in jobs:
            job.start()
        for key in list(running):
            say(f"warm-up: {key}", 0, 0, None)
            if (seconds := one(key)) is not None:
                limits[key] = max(_LEAST_TURN_S, _TURN_TIMES_WARM_UP * seconds)
        number, planned, racing = 0, group.least_rounds, list(running)
        while running and number < planned and stopped != "converged":
            round_began = clock()
            for condition in group.conditions:
                link.apply(condition)
                for key in racing if number % 2 == 0 else racing[::-1]:
                    if key not in running:
                        continue
                    say(key, number, planned, wide)
                    before = link.sent()
                    if (seconds := one(key)) is not None:
                        after = link.sent()
                        crossed = None if before is None or after is None else after - before
                        turns[key].append(
                            Turn(
                                condition=condition.name,
                                group=group.number,
                                round=number,
                                seconds=seconds,
                                link_bytes=crossed,
                            )
                        )
            number += 1
            turns |= {key: _with_usage(turns[key], job.usage()) for key, job in running.items()}
            raced = racing = [key for key in racing if key in running]
            if number >= group.least_rounds:
                racing = still_racing({key: turns[key] for key in racing}, group.ours, with_busy=group.with_busy)
            # A further round has those alone that still race.
            each = (
                (clock() - round_began)
                * _last_round_s(turns, racing, group)
                / (_last_round_s(turns, raced, group) or 1.0)
            )
            fit = number + int((began + group.seconds - clock()) / each) if each > 0 else group.most_rounds
            planned = min(max(fit, group.least_rounds, number), group.most_rounds)
            wide = widest({key: turns[key] for key in racing}, group.ours, with_busy=group.with_busy)
            narrow = wide is not None and group.half_width is not None and wide.half_width <= group.half_width
            if narrow and number >= group.least_rounds:
                stopped = "converged"
            elif number >= group.most_rounds:
                stopped = "rounds"
        link.apply(LOOPBACK)
    except KeyboardInterrupt:
        interrupted, stopped = True, "interrupted"
    except BaseException as error:
        _end_all(running, Failure(cause="error", detail=f"the comparison failed: {error}"))
        raise
    say("ending", 0, 0, wide)
    failure = Failure(cause="interrupted", detail="the comparison was interrupted") if interrupted else None
    outcomes |= _end_all(running, failure)
    return {key: _measured(outcomes[key], turns[key], stopped) for key in turns if key in outcomes}, interrupted


def _last_round_s(turns: Mapping[str, Sequence[Turn]], keys: Iterable[str], group: Group) -> float:
    return sum(turn.seconds for key in keys for turn in turns[key][-len(group.conditions) :])


def _with_usage(turns: Sequence[Turn], usage: Sequence[BatchUsage]) -> list[Turn]:
    """Turns with what the processors did, where that is known; `usage` begins with the warm-up batch."""
    found = dict(enumerate(usage[1:]))
    return [turn if i not in found else turn.model_copy(update={"usage": found[i]}) for i, turn in enumerate(turns)]


def _end_all(running: Mapping[str, Job], failure: Failure | None) -> dict[str, Outcome]:
    """All at once, since each may take seconds."""
    if not running:
        return {}
    with ThreadPoolExecutor(len(running)) as pool:
        ends = {key: pool.submit(job.end, failure) for key, job in running.items()}
        return {key: end.result() for key, end in ends.items()}


def _measured(outcome: Outcome, turns: Sequence[Turn], stopped: Stopped) -> Measured:
    failure = outcome.failure
    if failure is not None and failure.cause == "interrupted" and len({t.round for t in turns}) >= LEAST_ROUNDS:
        # What was measured until then counts.
        failure = None
    return Measured(
        turns=_with_usage(turns, outcome.usage),
        stopped=stopped,
        losses=outcome.losses,
        memory_bytes=outcome.memory_bytes,
        bytes_per_batch=outcome.bytes_per_batch,
        failure=failure,
    )


def keep_little(folder: Path) -> None:
    """Of a run that succeeded: what it was asked to do, its batches and its log."""
    for path in folder.iterdir():
        if path.name in ("spec.json", "batches.jsonl", "log.txt"):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
