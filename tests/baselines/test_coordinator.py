"""Jobs of a comparison take turns; one that fails or is interrupted; the emulated link between them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import pytest

from axonn.errors import LaunchError
from axonn.observability.machine_usage import BatchUsage
from axonn.observability.records import Failure
from axonn.training.run_outcome import Outcome
from baselines.contenders import Contender
from baselines.coordinator import Condition, ContenderResult, JobGroup, LostJob, RanksJob, take_turns
from experiments.slow_link import why_no_link
from tests.helpers.busy import BUSY, QUIET, usage
from tests.helpers.rank_pool import ROOT

LINK = Condition(name="link", kbit=1000)


class MadeUpJob:
    """Trains for no time, and may die or be interrupted at a certain batch."""

    def __init__(self, key: str, log: list[str], *, dies_at: int | None = None, stop_at: int | None = None) -> None:
        self.key = key
        self.log = log
        self.dies_at, self.stop_at = dies_at, stop_at
        self.batches = 0
        self.ended_with: list[Failure | None] = []

    def start(self) -> None:
        self.log.append(f"start {self.key}")

    def turn(self, timeout_s: float) -> float:
        if self.batches == self.stop_at:
            raise KeyboardInterrupt
        if self.batches == self.dies_at:
            raise LostJob
        self.batches += 1
        self.log.append(self.key)
        return float(self.batches)

    def usage(self) -> list[BatchUsage]:
        return []

    def end(self, failure: Failure | None = None) -> Outcome:
        self.ended_with.append(failure)
        if self.dies_at is not None and self.batches == self.dies_at:
            failure = Failure(cause="dead-rank", detail="rank 1 was killed", rank=1)
        return Outcome(losses=[1.0] * self.batches, memory_bytes=7, failure=failure)


class MadeUpLink:
    """Every turn sends 100 bytes."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self._asked = count()

    def apply(self, condition: Condition) -> None:
        self.log.append(f"<{condition.name}>")

    def sent(self) -> int | None:
        return 100 * next(self._asked)


def turns_of(
    jobs: Sequence[MadeUpJob], log: list[str], clock: Callable[[], float] = time.monotonic, **group: Any
) -> tuple[dict[str, ContenderResult], bool]:
    asked = JobGroup(**{"seconds": 0.0, "least_rounds": 5, **group})
    return take_turns(asked, jobs, link=MadeUpLink(log), say=lambda *_: None, clock=clock)


def test_rounds_alternate_in_order_and_reversed_order_after_one_warm_up() -> None:
    log: list[str] = []
    found, interrupted = turns_of([MadeUpJob(key, log) for key in "abc"], log, number=3)
    assert log[:9] == ["<loopback>", "start a", "start b", "start c", "a", "b", "c", "<loopback>", "a"]
    order = [entry for entry in log if len(entry) == 1]
    assert "".join(order) == "abc" + "abccba" * 2 + "abc"
    assert not interrupted
    for one in found.values():
        # The warm-up batch is the first and not among the turns.
        assert [turn.seconds for turn in one.turns] == [2, 3, 4, 5, 6]
        assert [turn.round for turn in one.turns] == [0, 1, 2, 3, 4]
        assert {(turn.group, turn.condition, turn.link_bytes) for turn in one.turns} == {(3, "loopback", 100)}
        assert (one.failure, one.memory_bytes, len(one.losses)) == (None, 7, 6)


def test_every_round_has_every_condition() -> None:
    log: list[str] = []
    other = Condition(name="other", kbit=5)
    found, _ = turns_of([MadeUpJob(key, log) for key in "ab"], log, conditions=[LINK, other])
    assert "".join(log).startswith("<loopback>start astart bab<link>ab<other>ab<link>ba<other>ba<link>ab")
    assert log[-1] == "<loopback>"
    assert [turn.condition for turn in found["a"].turns] == ["link", "other"] * 5


class PacedJob(MadeUpJob):
    """Takes as long for every batch, by the clock of its machine."""

    def __init__(self, key: str, log: list[str], seconds: Sequence[float]) -> None:
        super().__init__(key, log)
        self.seconds = seconds

    def turn(self, timeout_s: float) -> float:
        super().turn(timeout_s)
        return self.seconds[self.batches % len(self.seconds)]


def test_who_is_clearly_slower_than_the_fastest_of_its_side_gets_no_further_rounds() -> None:
    log: list[str] = []
    paces = {"ours": [1.0], "ours too": [1.3], "other": [1.2, 1.25], "close": [1.3, 1.2], "slow": [1.4]}
    jobs = [PacedJob(key, log, seconds) for key, seconds in paces.items()]
    found, _ = turns_of(jobs, log, least_rounds=12, ours=["ours", "ours too"])
    # At least the rounds that everyone gets.
    assert {key: len(one.turns) for key, one in found.items()} == dict.fromkeys(paces, 12)
    log.clear()
    jobs = [PacedJob(key, log, seconds) for key, seconds in paces.items()]
    found, _ = turns_of(jobs, log, least_rounds=4, most_rounds=9, seconds=1e6, ours=["ours", "ours too"])
    assert {key: len(one.turns) for key, one in found.items()} == {
        "ours": 9, "ours too": 4, "other": 9, "close": 9, "slow": 4,
    }  # fmt: skip
    assert all(one.failure is None for one in found.values())


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 5), (22.5, 9), (1000.0, 12)])
def test_as_many_rounds_are_made_as_fit_the_time(seconds: float, rounds: int) -> None:
    now = [0.0]
    log: list[str] = []

    class Timed(MadeUpJob):
        def turn(self, timeout_s: float) -> float:
            now[0] += 1.25
            return super().turn(timeout_s)

    jobs = [Timed(key, log) for key in "ab"]
    found, _ = turns_of(jobs, log, lambda: now[0], seconds=seconds, most_rounds=12)
    # Each round takes 2.5, and so does the warm-up.
    assert {len(one.turns) for one in found.values()} == {min(rounds, 8) if seconds == 22.5 else rounds}


class Noisy(MadeUpJob):
    """Batches of these seconds, and what the processors did in them; the warm-up one first."""

    def __init__(self, key: str, times: Sequence[float], usages: Sequence[BatchUsage] = ()) -> None:
        super().__init__(key, [])
        self.times, self.usages = times, usages

    def turn(self, timeout_s: float) -> float:
        super().turn(timeout_s)
        return self.times[self.batches - 1]

    def usage(self) -> list[BatchUsage]:
        return list(self.usages[: self.batches])


WIDE_AND_NARROW = [1.0, *[1.2, 0.8] * 4, *[1.0] * 100]
"""As of a machine that is noisy for the first 8 rounds."""


def rounds_of(theirs: Noisy, **group: Any) -> tuple[int, str | None, list[Any]]:
    """Rounds that were made beside a job of always the same time, why no more, and the widest intervals that were
    said."""
    said: list[Any] = []
    asked = {"seconds": 1000.0, "least_rounds": 4, "most_rounds": 50, "ours": ["a"], "half_width": 0.03} | group
    found, _ = take_turns(
        JobGroup(**asked),
        [Noisy("a", [1.0] * 200, [QUIET] * 200), theirs],
        link=MadeUpLink([]),
        say=lambda what, done, planned, wide: said.append(wide),
    )
    return len(found["b"].turns), found["b"].stopped, said


def test_rounds_go_on_until_the_intervals_are_narrow() -> None:
    calm, why, said = rounds_of(Noisy("b", [2.0] * 200))
    # No fewer make an interval.
    assert (calm, why) == (6, "converged")
    noisy, why, said = rounds_of(Noisy("b", WIDE_AND_NARROW))
    assert why == "converged"
    assert 12 < noisy < 50
    assert said[-1].key == "b"
    assert said[-1].half_width <= 0.03
    assert any(wide is not None and 0.03 < wide.half_width < inf for wide in said)
    assert rounds_of(Noisy("b", [1.2, 0.8] * 100))[:2] == (50, "rounds")
    assert rounds_of(Noisy("b", [1.2, 0.8] * 100), seconds=0.0)[:2] == (4, "minutes")
    assert rounds_of(Noisy("b", [2.0] * 200), half_width=None)[:2] == (50, "rounds")


def test_processor_seconds_have_intervals_that_count_too() -> None:
    uneven = [usage(processor_s=s) for s in [1.0, *[2.4, 1.6] * 4, *[2.0] * 100]]
    made, why, _ = rounds_of(Noisy("b", [2.0] * 200, uneven))
    assert why == "converged"
    assert made > 12


def test_rounds_of_a_busy_machine_bring_no_interval_nearer() -> None:
    loud = [QUIET, *[BUSY] * 10, *[QUIET] * 100]
    assert rounds_of(Noisy("b", [2.0] * 200, loud))[:2] == (16, "converged")
    assert rounds_of(Noisy("b", [2.0] * 200, loud), with_busy=True)[:2] == (6, "converged")
    assert rounds_of(Noisy("b", [2.0] * 200, [BUSY] * 200))[:2] == (50, "rounds")


@pytest.mark.parametrize("dies_at", [0, 3])
def test_a_job_that_dies_leaves_with_its_failure_and_the_others_go_on(dies_at: int) -> None:
    log: list[str] = []
    jobs = [MadeUpJob("a", log), MadeUpJob("b", log, dies_at=dies_at), MadeUpJob("c", log)]
    found, interrupted = turns_of(jobs, log)
    assert not interrupted
    assert [len(found[key].turns) for key in "abc"] == [5, max(0, dies_at - 1), 5]
    failure = found["b"].failure
    assert failure is not None
    assert (failure.cause, failure.rank) == ("dead-rank", 1)
    assert (found["a"].failure, found["c"].failure) == (None, None)
    assert [len(job.ended_with) for job in jobs] == [1, 1, 1]


@pytest.mark.parametrize(("stop_at", "kept"), [(3, False), (8, True)])
def test_an_interruption_ends_all_jobs_and_keeps_what_was_measured(stop_at: int, kept: bool) -> None:
    log: list[str] = []
    jobs = [MadeUpJob("a", log), MadeUpJob("b", log, stop_at=stop_at)]
    found, interrupted = turns_of(jobs, log, least_rounds=20)
    assert interrupted
    assert [[f and f.cause for f in job.ended_with] for job in jobs] == [["interrupted"]] * 2
    assert len(found["b"].turns) == stop_at - 1
    assert [one.failure is None for one in found.values()] == [kept, kept]


def test_an_error_of_the_link_ends_all_jobs() -> None:
    log: list[str] = []
    jobs = [MadeUpJob(key, log) for key in "ab"]

    class Broken(MadeUpLink):
        def apply(self, condition: Condition) -> None:
            if condition.kbit is not None:
                raise LaunchError("no such rate")

    group = JobGroup(seconds=0.0, conditions=[LINK])
    with pytest.raises(LaunchError, match="no such rate"):
        take_turns(group, jobs, link=Broken(log), say=lambda *_: None)
    assert [[f and f.cause for f in job.ended_with] for job in jobs] == [["error"]] * 2


def test_an_adapter_that_fails_to_prepare_is_a_failure(tmp_path: Path) -> None:
    """Here before any rank starts: the configuration is one that the framework does not take."""
    config = Contender(framework="axonn", variant="plain", kind="tensor").config("tiny", 2, steps=2)
    job = RanksJob("x", "pytorch/no-such", config, tmp_path / "run", link_only=False, device="cpu")
    found, _ = take_turns(JobGroup(seconds=0.0), [job], link=MadeUpLink([]), say=lambda *_: None)
    failure = found["x"].failure
    assert failure is not None
    assert "no strategy 'no-such'" in failure.detail


THROUGH_THE_LINK = """
import socket, threading, time
from baselines.coordinator import LOOPBACK, Condition
from baselines.comparison_session import EmulatedLink
link, size, kbit = EmulatedLink(), 1_000_000, 40_000
server = socket.create_server(("127.0.0.1", 0))
def receive():
    peer, _ = server.accept()
    got = 0
    while got < size:
        got += len(peer.recv(1 << 16))
    peer.sendall(b"k")
for condition in (LOOPBACK, Condition(name="slow", kbit=kbit), Condition(name="slower", kbit=kbit // 2)):
    link.apply(condition)
    threading.Thread(target=receive).start()
    client = socket.create_connection(server.getsockname())
    sent, start = link.sent(), time.perf_counter()
    client.sendall(bytes(size))
    client.recv(1)
    print(link.sent() - sent, time.perf_counter() - start)
link.apply(LOOPBACK)
"""


def test_the_link_has_its_rate_and_counts_what_crosses_it() -> None:
    if (reason := why_no_link()) is not None:
        pytest.skip(reason)
    command = ["unshare", "-n", "bash", "tools/slownet.sh", sys.executable, "-c", THROUGH_THE_LINK]
    environment = {**os.environ, "RATE": "1gbit"}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert all(1e6 < sent < 1.2e6 for sent, _ in rows)
    # Burst aside, it cannot be faster than its rate: 0.2 and 0.4 s.
    assert rows[1][1] > 0.15
    assert rows[2][1] > 0.3
