"""Ranks that stand still, are slow, or live in another time: told apart, from outside, by a clock that only goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import axonn.training.supervision.rank_watch
from axonn.config.train_config import CheckpointConfig, DataConfig, EvaluationConfig
from axonn.training.metrics import BATCHES, read_rows
from axonn.training.run_folder import Heartbeats, Progress, set_state
from axonn.training.supervision.cluster_launch import spec_of
from axonn.training.supervision.supervisor import supervise
from experiments import definition
from tests.helpers.command_line import TEXT, tiny
from tests.helpers.fault_injection import harm_ranks

STANDS = """
import time
from axonn.optim.model_optimizer import ModelOptimizer

begin = ModelOptimizer.begin_step

def stand_still(self, batch):
    if RANK == 1 and batch == 3:
        time.sleep(1e6)
    return begin(self, batch)

ModelOptimizer.begin_step = stand_still
"""


@pytest.mark.parametrize("transport", ["mpi", pytest.param("torch", marks=pytest.mark.full)])
def test_a_run_that_stands_still_is_ended_and_the_rank_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """All ranks live, and wait for one that never comes."""
    harm_ranks(tmp_path / "harm", monkeypatch, STANDS)
    config = tiny(stall_limit_s=5.0, transport=transport)
    outcome = supervise("axonn", config, tmp_path / "run", timeout_s=200)
    assert outcome.failure is not None
    assert (outcome.failure.cause, outcome.failure.rank) == ("timeout", 1)
    assert "rank 1 stopped first; raise stall_limit_s" in outcome.failure.detail
    assert "in stand_still" in outcome.failure.detail, "where it stands is not told"
    assert len(outcome.losses) >= 3


def test_without_a_supervisor_the_first_rank_ends_a_standstill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a job on a cluster, where nobody of ours watches from outside."""
    harm_ranks(tmp_path / "harm", monkeypatch, STANDS.replace("RANK == 1 and ", ""))
    config = tiny(inter=1, stall_limit_s=3.0)
    (tmp_path / "spec.json").write_text(spec_of("axonn", config, checkpoint=None, turns=False, device="cpu"))
    ended = subprocess.run(
        [sys.executable, "-m", "axonn.training.worker", str(tmp_path)],
        cwd=definition.ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 1
    state = json.loads((tmp_path / "rank-0.json").read_text())
    assert (state["state"], state["cause"]) == ("failed", "timeout")
    assert "rank 0 stopped first" in state["detail"]
    assert "stand_still" in ended.stderr
    assert len(read_rows(tmp_path / BATCHES)) == 3


@contextmanager
def slowed(folder: Path, rank: int, *, share: float) -> Iterator[list[float]]:
    """Give a rank only a share of the time, as a machine that is too busy does; how long each of its pauses was."""
    over = threading.Event()
    pauses: list[float] = []

    def disturb() -> None:
        state = folder / f"rank-{rank}.json"
        while not over.is_set():
            try:
                found = json.loads(state.read_text())
            except (OSError, ValueError):
                over.wait(0.05)
                continue
            if found["state"] != "started":
                return
            begin = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(found["pid"], signal.SIGSTOP)
                over.wait(0.2 * (1 - share))
                os.kill(found["pid"], signal.SIGCONT)
            pauses.append(time.monotonic() - begin)
            over.wait(0.2 * share)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield pauses
    finally:
        over.set()
        thread.join()


@pytest.mark.full
def test_a_rank_that_is_ten_times_slower_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither silence nor a standstill, though a batch takes longer than the limit of a standstill may be."""
    config = tiny(steps=30, stall_limit_s=20.0, evaluation=EvaluationConfig(every=10), data=DataConfig(path=str(TEXT)))
    whole = supervise("axonn", config, tmp_path / "alone", timeout_s=250)
    with slowed(tmp_path / "run", 1, share=0.1) as pauses:
        outcome = supervise("axonn", config, tmp_path / "run", timeout_s=250)
    assert len(pauses) > 3, "it was not slowed"
    assert outcome.failure is None
    assert outcome.losses == whole.losses


JUMPS = """
import itertools, time
real = time.time
jumps = itertools.cycle([0.0, 7200.0, -86400.0 * 400])
time.time = lambda: real() + next(jumps)
"""


@pytest.mark.full
def test_jumps_of_the_clock_disturb_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the ranks, and that of who watches them."""
    harm_ranks(tmp_path / "harm", monkeypatch, JUMPS)
    real = time.time
    started = time.monotonic()
    monkeypatch.setattr(time, "time", lambda: real() + (3600.0 if time.monotonic() - started > 3 else -9000.0))
    config = tiny(
        steps=200,
        stall_limit_s=60.0,
        data=DataConfig(path=str(TEXT)),
        checkpoints=CheckpointConfig(every=50),
    )
    outcome = supervise("axonn", config, tmp_path / "run", timeout_s=250)
    assert outcome.failure is None
    assert len(outcome.losses) == 200
    assert all(0 < seconds < 250 for seconds in outcome.batch_times_s)


# --- the watch itself, on a clock that the test holds


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def beat(folder: Path, rank: int, count: int, age: float, *, number: int) -> None:
    path = folder / f"rank-{rank}.alive"
    path.write_text(f"{count} {age:.3f}".ljust(64))
    os.utime(path, ns=(number, number))


def test_silence_and_standstill_are_counted_by_who_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    beats = Heartbeats(tmp_path, 2)
    clock.now += 500
    beats.look()
    assert (beats.silence(0), beats.standstill()) == (0.0, 0.0), "nobody has begun"
    for rank in (0, 1):
        beat(tmp_path, rank, 0, 0.0, number=10**18)
    beats.look()
    for second in range(1, 31):
        clock.now += 1
        # Rank 0's clock goes back a year; rank 1 has stopped altogether.
        beat(tmp_path, 0, second, 0.1, number=10**18 - second)
        beats.look()
    assert (beats.silence(0), beats.silence(1)) == (0.0, 30.0)
    assert beats.standstill() == 0.0
    for second in range(1, 41):
        clock.now += 1
        beat(tmp_path, 0, 30, float(second), number=10**17 + second)
        beats.look()
    assert (beats.silence(0), beats.standstill()) == (0.0, 40.0)
    clock.now += 1
    beat(tmp_path, 1, 1, 0.0, number=10**17)
    beats.look()
    assert (beats.silence(1), beats.standstill()) == (0.0, 0.0), "a slow rank is enough"


def test_who_stopped_first_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = Heartbeats(tmp_path, 3)
    for rank, age in enumerate([41.0, 41.3, 40.9]):
        beat(tmp_path, rank, 5, age, number=time.time_ns())
    beats.look()
    assert beats.first_to_stop() == 1


def test_ranks_that_do_not_say_what_they_finish_never_stand_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    beats = Heartbeats(tmp_path, 1)
    (tmp_path / "rank-0.alive").write_text(" " * 64)
    beats.look()
    for _ in range(1000):
        clock.now += 1
        beats.look()
    assert beats.standstill() == 0.0
    assert beats.silence(0) == 1000


@pytest.mark.parametrize("content", ["", "x", "3", "3 x", "\x00" * 64, "1e9 1"])
def test_a_beat_that_cannot_be_read_is_waited_for(tmp_path: Path, content: str) -> None:
    beats = Heartbeats(tmp_path, 1)
    (tmp_path / "rank-0.alive").write_text(content)
    beats.look()
    assert beats.standstill() == 0.0


def test_progress_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    progress = Progress()
    clock.now += 3
    progress.note()
    assert (progress.count, progress.at) == (1, clock.now)


def test_the_state_of_a_rank_is_one_line(tmp_path: Path) -> None:
    set_state(tmp_path, 3, "failed", cause="error", detail="two\nlines")
    text = (tmp_path / "rank-3.json").read_text()
    assert len(text.splitlines()) == 1
    assert json.loads(text)["detail"] == "two\nlines"
    assert os.listdir(tmp_path) == ["rank-3.json"]


def test_the_limits_are_apart() -> None:
    """Silence is the machine's, a standstill the work's: who raises one does not raise the other."""
    assert axonn.training.supervision.rank_watch.SILENCE_S < 30.0
    assert tiny().stall_limit_s == 1800.0
