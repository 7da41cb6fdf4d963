"""A rank is dead only if it is: starved and blocked ranks are told apart from those that ended or are stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import axonn.training.supervision.rank_watch
from axonn.config.train_config import DataConfig
from axonn.observability.procfs import ProcessReading
from axonn.observability.records import Failure
from axonn.training.run_folder import Heartbeats
from axonn.training.run_outcome import rank_state
from axonn.training.supervision import liveness
from axonn.training.supervision.liveness import Vitality, counted_standstill
from axonn.training.supervision.supervisor import supervise
from tests.helpers.command_line import TEXT, tiny

pytestmark = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's /proc/*/schedstat")


OTHERS = 16
"""Processes that compute on the core of the starved rank."""
SPIN = """
import os
os.sched_setaffinity(0, {{{core}}})
for other in range({others} - 1):
    if os.fork() == 0:
        # Sessions share a core equally, however many processes they have.
        os.setsid()
        break
parent = os.getppid()
while os.getppid() == parent:
    pass
"""


class Starver:
    """Has a rank wait for a core that other processes use, at a priority far above its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._others: list[subprocess.Popen[bytes]] = []
        self.warnings: list[str] = []
        self.done = 0
        self.done_when_told: int | None = None

    def on_batch(self, done: int) -> None:
        self.done = done
        if not self._others and done >= 3:
            core = min(os.sched_getaffinity(0))
            spin = SPIN.format(core=core, others=OTHERS)
            self._others = [subprocess.Popen([sys.executable, "-c", spin], start_new_session=True)]
            self._rank = rank_state(self._folder, 1)["pid"]
            for task in Path(f"/proc/{self._rank}/task").iterdir():
                os.sched_setaffinity(int(task.name), {core})
                os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
            self._lower(19)

    def _lower(self, nice: int) -> None:
        """The priority of the ranks' session, where the system shares cores by sessions."""
        with contextlib.suppress(OSError):
            Path(f"/proc/{self._rank}/autogroup").write_text(str(nice))

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)
        self.done_when_told = self.done
        self.end()
        self._lower(0)

    def goes_on(self) -> Failure | None:
        """Enough, once batches are finished after the warning."""
        if self.done_when_told is None or self.done < self.done_when_told + 2:
            return None
        return Failure(cause="interrupted", detail="it goes on")

    def end(self) -> None:
        for other in self._others:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(other.pid, signal.SIGKILL)
            other.wait()


@pytest.fixture
def starver(tmp_path: Path) -> Iterator[Starver]:
    made = Starver(tmp_path / "run")
    yield made
    made.end()


def test_a_starved_rank_is_not_ended(tmp_path: Path, starver: Starver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heartbeat is late by more than the limit, and it is said to be starved, with the load."""
    monkeypatch.setattr(axonn.training.supervision.rank_watch, "SILENCE_S", 3.0)
    outcome = supervise(
        "axonn",
        tiny(data=DataConfig(path=str(TEXT))),
        tmp_path / "run",
        on_batch=starver.on_batch,
        on_warning=starver.on_warning,
        give_up=starver.goes_on,
        timeout_s=250,
    )
    assert outcome.failure is not None
    assert outcome.failure.detail == "it goes on", starver.warnings
    # The other rank is of the same session.
    assert re.match(r"rank [01] is starved: no sign of life for \d+ s, .*; load [\d.]+; ", starver.warnings[0])
    assert f"warning: {starver.warnings[0]}" in (tmp_path / "run" / "log.txt").read_text()


# --- what is said of a process, on a clock and with readings that the test holds


class Machine:
    """One process by what /proc would say of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.reading = 0.0, ProcessReading("S", 0.0, 0.0)
        self.runnable, self.ended = False, False
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(liveness, "read_process", lambda process: None if self.ended else self.reading)
        monkeypatch.setattr(liveness, "_is_runnable", lambda process: self.runnable)
        self.warnings: list[str] = []
        self.vitality = Vitality(lambda rank: {"pid": 1}, self.warnings.append)

    def passes(self, seconds: int, *, state: str = "S", computed: float = 0.0, delayed: float = 0.0) -> None:
        """Seconds in each of which it computed and waited for a core so long, and was looked at."""
        for _ in range(seconds):
            self.now += 1.0
            r = self.reading
            self.reading = ProcessReading(state, r.processor_s + computed, (r.delay_s or 0.0) + delayed)
            assert self.vitality.why_dead(0, self.now) is None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("state", "word"), [("T", "stopped (state T"), ("t", "stopped (state t"), ("Z", "has ended"), ("X", "has ended")]
)
def test_a_process_that_is_stopped_or_has_ended_is_dead(machine: Machine, state: str, word: str) -> None:
    machine.reading = ProcessReading(state, 1.0, 1.0)
    assert word in (machine.vitality.why_dead(0, 21.0) or "")
    machine.ended = True
    assert "its process has ended" in (machine.vitality.why_dead(0, 21.0) or "")


@pytest.mark.parametrize(
    ("doing", "word"),
    [
        ({"state": "R", "delayed": 0.95, "computed": 0.02}, "starved"),
        ({"state": "R", "computed": 0.9}, "busy"),
        ({"state": "D"}, "blocked"),
        ({"state": "S"}, "blocked"),
    ],
)
def test_any_other_is_waited_for_and_told_once(machine: Machine, doing: dict[str, object], word: str) -> None:
    machine.passes(600, **doing)  # type: ignore[arg-type]
    (said,) = machine.warnings
    assert said.startswith(f"rank 0 is {word}: no sign of life for")
    assert "load" in said
    assert said.endswith("it is waited for")


def test_a_process_that_never_gets_a_core_is_starved(machine: Machine) -> None:
    """The system counts a delay when it is over."""
    machine.runnable = True
    machine.passes(60, state="R")
    assert "is starved" in machine.warnings[0]


def test_without_proc_silence_is_all_there_is(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.ended = True
    monkeypatch.setattr(liveness, "PROC", Path("/nowhere"))
    assert machine.vitality.why_dead(0, 21.0) == "rank 0 gave no sign of life for 21 s"


def test_time_without_a_core_is_no_standstill(machine: Machine) -> None:
    def stands(seconds: int, delayed: float) -> float:
        starved = 0.0
        for second in range(1, seconds + 1):
            machine.now += 1.0
            r = machine.reading
            machine.reading = ProcessReading("R", r.processor_s + 0.01, (r.delay_s or 0.0) + delayed)
            starved = machine.vitality.starved_s(range(1), float(second))
        return starved

    assert stands(100, 0.0) == 0.0
    assert stands(100, 0.9) == pytest.approx(90, rel=0.05), "something was finished, and it stands again"
    # Threads that wait beside one another: no second counts twice.
    assert stands(100, 7.0) <= 100
    assert machine.vitality.starved_s(range(1), 0.0) == 0.0
    assert counted_standstill(100.0, 60.0) == 40.0
    assert counted_standstill(100.0, 99.0) == 25.0, "it would never end"


def test_time_in_which_nobody_looked_is_held_against_no_rank(tmp_path: Path, machine: Machine) -> None:
    """As when the command was stopped and goes on, or had no core itself."""
    beats = Heartbeats(tmp_path, 1)
    (tmp_path / "rank-0.alive").write_text("3 0.1".ljust(64))
    for _ in range(10):
        machine.now += 1.0
        beats.look()
    assert beats.silence(0) == beats.standstill() == 9.0
    machine.now += 3600.0
    beats.look()
    assert beats.silence(0) == beats.standstill() == 14.0
