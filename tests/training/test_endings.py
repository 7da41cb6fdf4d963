"""Every way to end a run in docs/endings.md is tried as it says; or the row is tried elsewhere, or cannot be."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from axonn.training.supervision import interruption
from axonn.training.supervision.interruption import Interrupted, PendingSignals, exit_status, noted, raised
from axonn.training.supervision.rank_watch import SAVE_S, Watch
from axonn.training.supervision.session_folders import remove_stale, session_folders
from experiments.definition import ROOT
from tests.helpers.endings import Training, end_what_is_left, wait_for

SAID = "saving a checkpoint after this batch"


def row_of(page: str, start: str) -> list[str]:
    """Cells of the table's row that begins so."""
    rows = [line for line in page.splitlines() if line.startswith(f"| {start}")]
    assert len(rows) == 1, start
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", rows[0])[1:-1]]


PAGE = (ROOT / "docs" / "endings.md").read_text(encoding="utf-8")


# --- signals by which a run saves


@pytest.fixture(autouse=True)
def _nothing_goes_on(tmp_path: Path) -> Iterator[None]:
    yield
    end_what_is_left(tmp_path)


@pytest.mark.parametrize(
    ("row", "number"),
    [
        ("Control-C (SIGINT)", signal.SIGINT),
        ("`kill`, `timeout`", signal.SIGTERM),
        ("terminal closed, connection lost", signal.SIGHUP),
        ("warning of a scheduler", signal.SIGUSR1),
        pytest.param("warning of a scheduler", signal.SIGUSR2, marks=pytest.mark.full),
        pytest.param("limit of processor time", signal.SIGXCPU, marks=pytest.mark.full),
    ],
)
def test_a_signal_lets_the_run_save(tmp_path: Path, row: str, number: signal.Signals) -> None:
    run = Training(tmp_path).has_trained()
    segments = list(Path("/dev/shm").glob(f"axonn-run-{run.process.pid}-*/sm_segment.*"))
    assert len(segments) == 2, "shared memory of the ranks does not lie where it is removed"
    run.send(number)
    status = run.ended()
    assert str(status) in row_of(PAGE, row)[2].split(", ")
    assert status == 128 + number
    assert run.saved == len(run.rows) >= 3
    assert run.failure is not None
    assert run.failure.cause == "interrupted"
    assert number.name in run.failure.detail or number == signal.SIGINT
    assert SAID in run.text
    assert f"the newest checkpoint is of batch {run.saved}; the same command goes on from there" in run.text
    assert "Traceback" not in run.text
    run.leaves_nothing()


def test_a_run_without_checkpoints_ends_at_once_and_writes_none(tmp_path: Path) -> None:
    run = Training(tmp_path, checkpoints=None).has_trained()
    run.send(signal.SIGTERM)
    assert run.ended() == 143
    assert run.saved is None
    assert run.failure is not None
    assert run.failure.cause == "interrupted"
    assert SAID not in run.text
    assert "the next start begins anew" in run.text
    run.leaves_nothing()


def test_sigquit_ends_at_once(tmp_path: Path) -> None:
    run = Training(tmp_path).has_trained()
    run.send(signal.SIGQUIT)
    assert str(run.ended()) == row_of(PAGE, "Control-\\ (SIGQUIT)")[2]
    assert run.saved is None
    assert run.failure is not None
    assert run.failure.cause == "interrupted"
    run.leaves_nothing()


@pytest.mark.parametrize(
    ("row", "number"),
    [("Control-C twice", signal.SIGINT), pytest.param("`kill` twice", signal.SIGTERM, marks=pytest.mark.full)],
)
def test_a_second_signal_ends_at_once(tmp_path: Path, row: str, number: signal.Signals) -> None:
    run = Training(tmp_path).has_trained()
    # So that they do not save in between.
    for rank in (0, 1):
        os.kill(run.rank(rank), signal.SIGSTOP)
    run.send(number)
    wait_for(lambda: SAID in run.text, "the first answer")
    run.send(number)
    assert str(run.ended()) == row_of(PAGE, row)[2]
    assert run.saved is None
    assert run.failure is not None
    assert "again before the ranks had saved" in run.failure.detail
    run.leaves_nothing()


# --- terminals, pipes, files


@pytest.mark.full
def test_a_terminal_that_is_closed_lets_the_run_save(tmp_path: Path) -> None:
    """A real one: what is printed afterwards goes nowhere."""
    ours, theirs = os.openpty()

    def control() -> None:
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    run = Training(tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=control).has_trained()
    os.close(theirs)
    os.close(ours)
    assert run.ended() == 129
    assert run.saved == len(run.rows)
    assert run.failure is not None
    run.leaves_nothing()


@pytest.mark.full
def test_under_nohup_a_closed_terminal_changes_nothing(tmp_path: Path) -> None:
    run = Training(tmp_path, before=["nohup"]).has_trained()
    run.send(signal.SIGHUP)
    before = len(run.rows)
    wait_for(lambda: len(run.rows) > before + 2, "more batches")
    run.send(signal.SIGTERM)
    assert run.ended() == 143


@pytest.mark.full
def test_a_stopped_command_goes_on(tmp_path: Path) -> None:
    """As after Control-Z and fg; longer than a rank may be silent."""
    run = Training(tmp_path).has_trained()
    run.send(signal.SIGSTOP)
    before = len(run.rows)
    time.sleep(22)
    assert len(run.rows) > before, "the ranks did not go on"
    run.send(signal.SIGCONT)
    time.sleep(2)
    assert run.process.poll() is None, run.text
    run.send(signal.SIGINT)
    assert run.ended() == 130
    assert run.saved == len(run.rows)


@pytest.mark.full
def test_an_output_that_nobody_reads_lets_the_run_save(tmp_path: Path) -> None:
    read, write = os.pipe()
    run = Training(tmp_path, stdout=write, stderr=subprocess.DEVNULL)
    os.close(write)
    assert os.read(read, 1)
    os.close(read)
    assert str(run.ended()) == row_of(PAGE, "nobody reads the output")[2]
    assert run.saved == len(run.rows) >= 1
    assert run.failure is not None
    assert "SIGPIPE" in run.failure.detail
    run.leaves_nothing()


@pytest.mark.full
def test_a_closed_input_changes_nothing(tmp_path: Path) -> None:
    run = Training(tmp_path, preexec_fn=lambda: os.close(0)).has_trained()
    run.send(signal.SIGTERM)
    assert run.ended() == 143
    assert run.saved == len(run.rows)


def test_the_file_stop_lets_the_run_save(tmp_path: Path) -> None:
    run = Training(tmp_path).has_trained()
    (run.folder / "stop").touch()
    assert str(run.ended()) == row_of(PAGE, "`touch runs/my/stop`")[2]
    assert run.saved == len(run.rows)
    assert "the same command goes on from there" in run.text
    run.leaves_nothing()


# --- what cannot be answered


def test_a_killed_command_leaves_nothing(tmp_path: Path) -> None:
    run = Training(tmp_path).has_trained()
    run.send(signal.SIGKILL)
    assert str(run.ended()) == row_of(PAGE, "`kill -9` of the command")[2]
    run.leaves_nothing()


@pytest.mark.parametrize(
    ("row", "cause", "victim"),
    [
        ("`kill -9` of a rank", "dead-rank", lambda run: run.rank(1)),
        ("`kill -9` of mpiexec", "error", lambda run: run.launcher()),
    ],
)
def test_a_killed_process_of_the_run(tmp_path: Path, row: str, cause: str, victim: Callable[[Training], int]) -> None:
    run = Training(tmp_path).has_trained()
    os.kill(victim(run), signal.SIGKILL)
    assert str(run.ended()) == row_of(PAGE, row)[2]
    assert run.failure is not None
    assert run.failure.cause == cause
    run.leaves_nothing()


@pytest.mark.full
def test_what_was_killed_together_is_removed_by_the_next_run(tmp_path: Path) -> None:
    run = Training(tmp_path).has_trained()
    victims = [run.process.pid, run.launcher(), run.rank(0), run.rank(1)]
    for victim in victims:
        os.kill(victim, signal.SIGSTOP)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    run.process.wait()
    assert len(run.leftovers()) >= 2, "nothing was left"
    for root in (run.temporary, Path("/dev/shm")):
        remove_stale(root)
    run.leaves_nothing()


def test_only_folders_of_ended_runs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("axonn.training.supervision.session_folders.SHARED_MEMORY", tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f"axonn-run-{gone.pid}-x").mkdir()
    foreign = ["axonn-run-x", "axonn-run-1-x", "ompi.123", "prterun.1"]
    for name in foreign:
        (tmp_path / name).mkdir()
    (tmp_path / f"axonn-run-{gone.pid}-file").write_text("no folder")
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / f"axonn-run-{gone.pid}-link").symlink_to(target)
    kept = {*foreign, "target", f"axonn-run-{gone.pid}-file", f"axonn-run-{gone.pid}-link"}
    with session_folders() as environment:
        made = {Path(folder).name for folder in environment["AXONN_SESSION"].split(os.pathsep)}
        assert len(made) == 2
        assert {path.name for path in tmp_path.iterdir()} == kept | made
        # Another run starts meanwhile.
        remove_stale(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == kept | made
    assert {path.name for path in tmp_path.iterdir()} == kept


# --- the other commands


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.full) for n in (signal.SIGHUP, signal.SIGINT))],
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "experiments/fig6.yaml", "--fresh"],
        ["calibrate", "--quick", "--out", "{}/local.yaml"],
        ["predict", "--validate", "--fresh"],
        ["plan", "--model", "gpt-100b", "--machine", "summit", "--gpus", "384", "--batch", "16384"],
    ],
    ids=lambda value: value[0],
)
def test_another_command_ends_with_the_usual_status(
    tmp_path: Path, arguments: list[str], number: signal.Signals
) -> None:
    """When it works: its code counts, which is at that of a copy, so that no results of this clone are touched."""
    script = f"""
import sys, time, threading, os
from pathlib import Path
from axonn.cli import main as cli
from experiments import runner
runner.PROJECT = Path({str(tmp_path)!r})
runner.RUNS, runner.MEASURED = runner.PROJECT / "runs", runner.PROJECT / "measured"
def send():
    time.sleep(1.0)
    os.kill(os.getpid(), {int(number)})
threading.Thread(target=send, daemon=True).start()
cli.main()
"""
    given = [argument.format(tmp_path) for argument in arguments]
    ended = subprocess.run(
        [sys.executable, "-c", script, *given],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 128 + number, ended.stderr
    assert "what is done is kept" in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.glob("axonn-*"))


# --- the parts


class Over:
    """A process that never ends."""

    def poll(self) -> None:
        return None


def test_ranks_that_do_not_save_in_time_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 1.0))
    heard: list[str] = []

    def end_of(*numbers: int) -> tuple[str, float]:
        pending = PendingSignals()
        start = now[0]
        watch = Watch(
            Over(),  # type: ignore[arg-type]
            tmp_path,
            1,
            timeout_s=1000.0,
            stall_limit_s=1e9,
            on_batch=lambda done: None,
            give_up=lambda: None,
            pending=pending,
            on_stop=heard.append,
            on_warning=heard.append,
        )
        for number in numbers:
            pending.note(number)
        failure = watch.until_end()
        assert failure is not None
        return failure.cause, now[0] - start

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        cause, seconds = end_of(number)
        assert cause == "interrupted"
        assert SAVE_S < seconds < SAVE_S + 3
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
        assert end_of(number)[0] == "timeout", "it was not given all the time it needs"
    # The end after its warning is the first to count; a terminal tells its shell, which tells it again.
    for numbers in ((signal.SIGUSR1, signal.SIGTERM), (signal.SIGHUP, signal.SIGHUP)):
        cause, seconds = end_of(*numbers)
        assert cause == "interrupted"
        assert seconds > SAVE_S
    assert end_of(signal.SIGTERM, signal.SIGINT)[1] < 5
    assert (tmp_path / "stop").exists()


def test_signals_are_raised_and_what_was_ignored_stays_so() -> None:
    before = {number: signal.getsignal(number) for number in interruption.ENDING}
    hup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(Interrupted) as caught:
                signal.raise_signal(signal.SIGTERM)
        assert exit_status(caught.value) == 143
    finally:
        signal.signal(signal.SIGHUP, hup)
    assert {number: signal.getsignal(number) for number in interruption.ENDING} == before


def test_noted_signals_are_raised_at_the_end() -> None:
    done = []
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with raised(), noted() as pending:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGQUIT)
            done.append((pending.first, pending.another))

    with pytest.raises(Interrupted) as caught:
        work()
    assert done == [(signal.SIGTERM, True)]
    assert exit_status(caught.value) == 143
    with raised(), noted() as pending:
        signal.raise_signal(signal.SIGTERM)
        pending.settle()
    assert signal.getsignal(signal.SIGINT) is before


TRIED: dict[str, Callable[..., None]] = {
    "Control-C (SIGINT)": test_a_signal_lets_the_run_save,
    "Control-C twice": test_a_second_signal_ends_at_once,
    "Control-\\ (SIGQUIT)": test_sigquit_ends_at_once,
    "Control-Z": test_a_stopped_command_goes_on,
    "terminal closed, connection lost": test_a_terminal_that_is_closed_lets_the_run_save,
    "terminal closed under `nohup`": test_under_nohup_a_closed_terminal_changes_nothing,
    "`kill`, `timeout`": test_a_signal_lets_the_run_save,
    "`kill` twice": test_a_second_signal_ends_at_once,
    "warning of a scheduler": test_a_signal_lets_the_run_save,
    "limit of processor time": test_a_signal_lets_the_run_save,
    "nobody reads the output": test_an_output_that_nobody_reads_lets_the_run_save,
    "input closed": test_a_closed_input_changes_nothing,
    "`touch runs/my/stop`": test_the_file_stop_lets_the_run_save,
    "`kill -9` of the command": test_a_killed_command_leaves_nothing,
    "`kill -9` of a rank": test_a_killed_process_of_the_run,
    "`kill -9` of mpiexec": test_a_killed_process_of_the_run,
}
ELSEWHERE = {
    "a rank stopped": "tests/training/test_faults.py: test_a_stopped_rank_is_found",
    "memory runs out": "tests/training/test_faults.py: test_a_killed_rank_ends_the_run_and_is_named",
    "disk full": "tests/training/test_fault_disk.py: test_a_run_goes_on_after_the_disk_was_full",
    "wall limit of a job": "tests/jobscripts/test_job_body.py: test_our_ranks_stop_near_the_limit",
    "job cancelled": "tests/jobscripts/test_job_body.py: test_a_cancelled_job_ends_its_ranks",
    "node lost": "tests/slurm/test_end_to_end.py: test_a_failed_node",
}
CANNOT_BE_TRIED = {
    "reboot": "a test cannot; that a checkpoint is on disk before it has its name: tests/checkpoint/test_checkpoint.py"
}


def test_every_row_is_tried_or_says_why_not() -> None:
    rows = [line[2:] for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| what happens")]
    names = [*TRIED, *ELSEWHERE, *CANNOT_BE_TRIED]
    assert [sum(row.startswith(name) for name in names) for row in rows] == [1] * len(rows), rows
    assert len(names) == len(rows), "a name here is of no row of docs/endings.md"
    for name, test in TRIED.items():
        cases = [mark.args[1] for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        # One test for several rows says which it tries.
        assert not cases or any(name in str(case) for case in cases), name
    for where in ELSEWHERE.values():
        file, _, name = where.partition(": ")
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), where
