"""What goes wrong ends the whole run soon, says what it was, keeps what is done and leaves nothing behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import axonn.training.supervision.rank_watch
import axonn.training.supervision.supervisor
from axonn.config.train_config import DataConfig
from axonn.errors import LaunchError
from axonn.grid import ProcessGrid
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.training.run_outcome import Outcome
from axonn.training.supervision.supervisor import supervise
from experiments import definition, runner
from tests.helpers.command_line import CommandLine, tiny
from tests.helpers.endings import processes_of
from tests.helpers.soak import soak

AXONN = Path(sys.executable).parent / "axonn"
END_S = 30.0
"""From the death of a rank to the end of the run. A promise of the suite, not a guess about the machine."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def nothing_runs(folder: Path) -> bool:
    end = time.monotonic() + 10.0  # what was killed may take a moment to vanish
    while (left := processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return not left


class Harm:
    """Sends a signal to a rank once `after` batches are done, and remembers when."""

    def __init__(self, folder: Path, number: signal.Signals, *, rank: int, after: int = 2) -> None:
        self.folder, self.number, self.rank, self.after = folder, number, rank, after
        self.at: float | None = None
        self.batches = 0

    def __call__(self, done: int) -> None:
        self.batches = max(self.batches, done)
        if self.at is None and done >= self.after:
            assert processes_of(self.folder), "nothing_runs would not see the ranks"
            pid = json.loads((self.folder / f"rank-{self.rank}.json").read_text())["pid"]
            os.kill(pid, self.number)
            self.at = time.monotonic()

    @property
    def seconds_ago(self) -> float:
        assert self.at is not None
        return time.monotonic() - self.at


def check_batches(outcome: Outcome, at_least: int) -> None:
    assert len(outcome.batch_times_s) == len(outcome.losses) >= at_least
    assert all(seconds > 0 for seconds in outcome.batch_times_s)
    assert all(0 < loss < 10 for loss in outcome.losses)


def test_a_run_without_faults_has_no_failure(folder: Path) -> None:
    """And what an earlier run left in the folder is not taken for its own."""
    folder.mkdir()
    (folder / "rank-1.json").write_text(json.dumps({"state": "failed", "time": 0, "cause": "nan", "detail": "old"}))
    (folder / "batches.jsonl").write_text('{"step": 0, "loss": 99.0, "seconds": 1.0}\n')
    counts: list[int] = []
    outcome = supervise("axonn", tiny(steps=3), folder, on_batch=counts.append)
    assert outcome.failure is None
    assert len(outcome.losses) == 3
    check_batches(outcome, 3)
    assert outcome.memory_bytes is not None
    assert 10 << 20 < outcome.memory_bytes < 10 << 30
    assert all(a < b <= 3 for a, b in pairwise(counts))
    assert nothing_runs(folder)


@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_rank_ends_the_run_and_is_named(folder: Path, rank: int) -> None:
    harm = Harm(folder, signal.SIGKILL, rank=rank)
    outcome = supervise("axonn", tiny(), folder, on_batch=harm, timeout_s=200)
    assert harm.seconds_ago < END_S
    assert outcome.failure is not None
    assert (outcome.failure.cause, outcome.failure.rank) == ("dead-rank", rank)
    assert f"rank {rank} was killed by SIGKILL" in outcome.failure.detail
    check_batches(outcome, harm.batches)
    assert nothing_runs(folder)


@pytest.mark.parametrize("rank", [2, 3], ids=["leader", "told"])
def test_a_killed_rank_of_a_stage_of_several_ends_the_run_and_is_named(folder: Path, rank: int) -> None:
    """Others wait for what it decides, or in its collectives."""
    config = tiny().model_copy(update={"grid": ProcessGrid(inter=2, col=2)})
    harm = Harm(folder, signal.SIGKILL, rank=rank)
    outcome = supervise("axonn", config, folder, on_batch=harm, timeout_s=200)
    assert harm.seconds_ago < END_S
    assert outcome.failure is not None
    assert (outcome.failure.cause, outcome.failure.rank) == ("dead-rank", rank)
    check_batches(outcome, harm.batches)
    assert nothing_runs(folder)


def test_a_killed_single_rank_is_named(folder: Path) -> None:
    harm = Harm(folder, signal.SIGSEGV, rank=0)
    outcome = supervise("axonn", tiny(inter=1), folder, on_batch=harm, timeout_s=200)
    assert harm.seconds_ago < END_S
    assert outcome.failure is not None
    assert (outcome.failure.cause, outcome.failure.rank) == ("dead-rank", 0)
    assert "SIGSEGV" in outcome.failure.detail
    check_batches(outcome, harm.batches)
    assert nothing_runs(folder)


def test_a_stopped_rank_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(axonn.training.supervision.rank_watch, "SILENCE_S", 6.0)
    harm = Harm(folder, signal.SIGSTOP, rank=1)
    outcome = supervise("axonn", tiny(), folder, on_batch=harm, timeout_s=200)
    assert outcome.failure is not None
    assert (outcome.failure.cause, outcome.failure.rank) == ("dead-rank", 1)
    assert "its process is stopped" in outcome.failure.detail
    check_batches(outcome, harm.batches)
    assert nothing_runs(folder)


@pytest.mark.full
def test_a_launcher_that_stops_costs_no_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks come to their end without it."""
    monkeypatch.setattr(axonn.training.supervision.rank_watch, "SILENCE_S", 6.0)

    def stop(done: int) -> None:
        pid = json.loads((folder / "rank-0.json").read_text())["pid"]
        launcher = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(launcher, signal.SIGSTOP)

    outcome = supervise("axonn", tiny(steps=600), folder, on_batch=stop, timeout_s=200)
    assert outcome.failure is None
    check_batches(outcome, 600)
    assert nothing_runs(folder)


def test_a_killed_launcher_ends_the_ranks(folder: Path) -> None:
    def kill(done: int) -> None:
        pid = json.loads((folder / "rank-0.json").read_text())["pid"]
        os.kill(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)

    outcome = supervise("axonn", tiny(), folder, on_batch=kill, timeout_s=200)
    assert outcome.failure is not None
    assert outcome.failure.cause == "error"
    assert "the launcher ended with code -9; ranks not finished: [0, 1]" in outcome.failure.detail
    assert nothing_runs(folder)


def test_a_stopped_rank_is_given_up_within_the_promise() -> None:
    assert axonn.training.supervision.rank_watch.SILENCE_S + 2 * axonn.training.supervision.supervisor.GRACE_S < END_S


def test_a_loss_that_is_not_a_number_is_a_failure_of_its_own(folder: Path) -> None:
    outcome = supervise("axonn", tiny(optimizer=AdamWConfig(lr=1e30)), folder, timeout_s=200)
    assert outcome.failure is not None
    assert outcome.failure.cause == "nan"
    assert "lower optimizer.lr" in outcome.failure.detail
    # The diverged batch is kept too: it shows when.
    assert len(outcome.losses) >= 2
    assert outcome.losses[0] == pytest.approx(5.5, abs=0.5)
    assert nothing_runs(folder)


def test_a_run_that_takes_too_long_is_ended(folder: Path) -> None:
    outcome = supervise("axonn", tiny(), folder, timeout_s=8)
    assert outcome.failure is not None
    assert (outcome.failure.cause, outcome.failure.rank) == ("timeout", None)
    assert "not finished after 8 s" in outcome.failure.detail
    assert all(0 < loss < 10 for loss in outcome.losses)
    assert nothing_runs(folder)


def test_an_error_on_the_ranks_is_told(folder: Path) -> None:
    outcome = supervise("axonn", tiny(data=DataConfig(path="none.txt")), folder, timeout_s=200)
    assert outcome.failure is not None
    assert outcome.failure.cause == "error"
    assert outcome.failure.rank in (0, 1)
    assert "DataError: none.txt: cannot be read" in outcome.failure.detail
    assert "Traceback" in (folder / "log.txt").read_text()
    assert nothing_runs(folder)


def test_ranks_do_not_outlive_a_killed_supervisor(folder: Path) -> None:
    code = "import sys; from tests.training.test_faults import *; supervise('axonn', tiny(), Path(sys.argv[1]))"
    supervisor = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=definition.ROOT)
    while not (folder / "batches.jsonl").exists():
        assert supervisor.poll() is None
        time.sleep(0.1)
    supervisor.kill()
    supervisor.wait()
    assert nothing_runs(folder)


def test_an_interruption_leaves_no_ranks(folder: Path) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise("axonn", tiny(), folder, on_batch=interrupt, timeout_s=200)
    assert (folder / "batches.jsonl").read_text()
    assert nothing_runs(folder)


# --- bad input on the command line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 9}, "batch_size 9 is not a multiple of G_data x microbatch_size = 1 x 2 = 2"),
        ({"grid": {"data": 3}}, "batch_size 8 is not a multiple of G_data x microbatch_size = 3 x 2 = 6"),
        ({"grid": {"inter": 7}}, "7 stages are more than the 6 into which this model can be cut; lower G_inter"),
        ({"grid": {"row": 3}}, "hidden (16) of embedding, norms and attention cannot be cut along row = 3"),
        ({"grid": {"data": 0}}, "'grid.data'"),
        ({"schedule": {"name": "1f2b"}}, "unknown schedule '1f2b'; known are message-driven, "),
        ({"schedule": {"name": "gpipe", "in_flight_limit": 2}}, "'gpipe' has no in_flight_limit"),
        ({"data": {"path": "none.txt"}}, "none.txt: cannot be read"),
        ({"data": {"path": "."}}, ".: cannot be read"),
        ({"batchsize": 8}, "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ({"steps": "many"}, "'steps'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(axonn: CommandLine, changes: dict[str, Any], message: str) -> None:
    axonn.refuses(message, "train", axonn.config(**changes))


def test_data_that_does_not_suit_the_model_is_refused(axonn: CommandLine) -> None:
    text = axonn.root / "text"
    text.write_bytes(b"too short")
    axonn.refuses("9 tokens are fewer than seq_len + 1 = 17", "train", axonn.config(data={"path": str(text)}))


def test_a_configuration_that_is_not_there_is_refused(axonn: CommandLine) -> None:
    axonn.refuses("none.yaml: cannot be read", "train", "none.yaml")


def test_several_ranks_without_mpi_are_refused(axonn: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/bin/python")
    monkeypatch.setenv("PATH", str(axonn.root))
    config = axonn.config(grid={"inter": 2})
    axonn.refuses("there is no mpiexec: several ranks need MPI; install it with pip install", "train", config)
    with pytest.raises(LaunchError, match="there is no mpiexec"):
        supervise("axonn", tiny(), axonn.root / "run")
    assert not (axonn.root / "run").exists()


def test_a_command_that_the_launcher_started_several_times_is_refused(
    axonn: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    message = "was launched 3 times, but starts the ranks of its grids itself; run it once, without mpiexec"
    axonn.refuses(message, "train", axonn.config(grid={"inter": 2}))


def test_a_single_rank_runs_inside_the_allocation_of_a_batch_system(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch script sees the variables of the whole job; a rank that it starts is not rank 0 of these four."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    outcome = supervise("axonn", tiny(inter=1, steps=2), folder, timeout_s=200)
    assert outcome.failure is None
    assert len(outcome.losses) == 2


def test_an_experiment_with_a_misspelt_key_is_refused(axonn: CommandLine) -> None:
    axonn.refuses("'measured.repeat'; did you mean 'repeats'?", "run", axonn.experiment(repeat=2))
    axonn.refuses("experiment.yaml: cannot be read", "predict", axonn.root / "none" / "experiment.yaml")


def test_an_unknown_framework_is_refused(axonn: CommandLine) -> None:
    axonn.refuses(
        "unknown framework 'axon'; did you mean 'axonn'? known are axonn", "run", axonn.experiment(frameworks=["axon"])
    )


@pytest.mark.parametrize("content", ['{"schema": "their-records/3", "points": []}', "not a record"])
def test_a_result_of_a_foreign_schema_is_not_overwritten(axonn: CommandLine, content: str) -> None:
    experiment = axonn.experiment()
    (point,) = runner.points_of(definition.load_experiment(experiment))
    point.record_file.parent.mkdir()
    point.record_file.write_text(content)
    axonn.refuses(f"{point.record_file}: ", "run", experiment)


def test_a_diverging_point_is_recorded_as_a_failure_and_repeated(axonn: CommandLine) -> None:
    diverging = axonn.experiment(optimizer={"lr": 1e30})
    (point,) = runner.points_of(definition.load_experiment(diverging))
    code, output, error = axonn("run", diverging)
    assert code == 2
    assert "1 of 1 points failed" in error
    assert "failed (nan)" in output
    record = json.loads(point.record_file.read_text())["records"][0]
    assert record["failure"]["cause"] == "nan"
    assert "batch_time_s" not in record
    assert "to do" in axonn("run", diverging, "--list")[1]
    code, output, _ = axonn("run", axonn.experiment())
    assert code == 0, output
    assert "1 points measured" in output
    code, output, _ = axonn("run", axonn.experiment())
    assert (code, output.partition(":")[0]) == (0, "nothing to do")


@pytest.mark.skipif(not AXONN.exists(), reason="the command is not installed beside this Python")
def test_the_installed_command_prints_no_traceback(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: {nam: x}\n")
    ended = subprocess.run(
        [AXONN, "train", config], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 2
    assert "unknown key 'model.nam'; did you mean 'name'?" in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


# --- killed, and going on


@pytest.mark.full
def test_killed_runs_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    try:
        soak(tmp_path, times=3, seed=seed)
    except AssertionError as error:
        raise AssertionError(f"repeat with: python -m tests.helpers.soak --times 3 --seed {seed}") from error
