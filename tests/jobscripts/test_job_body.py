"""What a job's script does when its ranks end, fail, are told to stop or do not; and that a new start goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from axonn.checkpoint.checkpoints import latest, load_whole
from axonn.config.train_config import TrainConfig
from axonn.distributed.launch import rank_environment
from axonn.distributed.runtime import connect
from axonn.spans import SpanRecorder, read_spans
from axonn.training.engine_framework import EngineTrainer
from axonn.training.framework import Launch
from axonn.training.loop import TrainingLoop
from axonn.training.metrics import BATCHES, read_rows
from axonn.training.resumption import CHECKPOINTS, newest_checkpoint
from axonn.training.run_folder import NEWEST, STOP, STOPPED
from axonn.training.supervision.cluster_launch import launch_worker, read_run
from experiments.cluster_work import SmallWork
from experiments.definition import ROOT
from jobscripts.generate import ClusterJob, write_jobs
from jobscripts.launchers import Launcher, load_launcher
from jobscripts.schedulers import Resources, load_scheduler
from jobscripts.site import Site
from jobscripts.system import System
from tests.helpers.cluster_jobs import check_shell
from tests.helpers.command_line import tiny
from tests.helpers.launches import files_of
from tests.helpers.rank_pool import RankPool

SYSTEM = System(machine="here", scheduler="none", launcher="mpiexec", cores_per_rank=1, device="cpu", source="test")


class Direct(Launcher):
    """Starts one rank, and is that rank."""

    name = "direct"
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}

    def command(self, resources: Resources, options: list[str]) -> list[str]:
        return ["env"]


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for an event, which is sure to come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.02)


class JobFolder:
    """A job without a batch system, written as `axonn jobs` does."""

    def __init__(
        self, root: Path, launch: Launch, *, config: TrainConfig, warn: int = 120, launcher: Launcher | None = None
    ) -> None:
        ranks = config.grid.inter
        resources = Resources(
            name="work",
            nodes=1,
            ranks_per_node=ranks,
            gpus_per_node=0,
            cores_per_rank=1,
            seconds=3600,
            warn_seconds=warn,
            account=None,
            queue=None,
            constraint=None,
            options=[],
        )
        write_jobs(
            [
                ClusterJob(
                    name="work",
                    framework="AxoNN",
                    adapter="axonn",
                    work=SmallWork(name="work", framework="axonn", config=config, warmup_batches=1),
                    launch=launch,
                    resources=resources,
                )
            ],
            root / "jobs",
            experiment="test",
            command="axonn jobs",
            system=SYSTEM,
            site=Site(),
            scheduler=load_scheduler("none"),
            launcher=launcher or Direct(),
        )
        self.folder = root / "jobs" / "work"
        self.run = self.folder / "run"
        self.environment = dict(os.environ)

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """The script's process; whatever happens, nothing of it is left."""
        process = subprocess.Popen(
            ["bash", "job.sh"],
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def attempt(self, process: subprocess.Popen[bytes]) -> Path:
        return self.run / f"attempt-{process.pid}"

    def ended(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        """(exit status, reason) of a script that ends, and has left no process of its session."""
        status = process.wait(60)
        said = json.loads((self.attempt(process) / "ended.json").read_text())
        assert (said["job"], said["status"]) == (str(process.pid), status)
        until(lambda: not _lives(process.pid), 10)
        return status, said["reason"]


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def stand_in(root: Path, script: str, **options: Any) -> JobFolder:
    """A job whose ranks are a shell script; `python` is one that answers at once."""
    (root / "bin").mkdir()
    (root / "bin" / "python").write_text("#!/bin/sh\necho nothing\n")
    (root / "bin" / "python").chmod(0o755)
    launch = Launch(command=["bash", "ranks.sh"], files={"ranks.sh": script}, stop_signal=options.pop("stop", None))
    job = JobFolder(root, launch, config=tiny(inter=1, steps=2), **options)
    job.environment["PATH"] = f"{root / 'bin'}:{job.environment['PATH']}"
    return job


RUNS = "touch running\nwhile [ ! -e stop ]; do sleep 0.1; done\n"
"""Ranks that look for the file."""
ENDLESS = "touch running\nwhile :; do sleep 0.1; done\n"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ranks_that_finish(tmp_path: Path) -> None:
    job = stand_in(tmp_path, 'echo "rank $RANK of $WORLD_SIZE in $PWD"\n')
    before = set(files(tmp_path))
    with job.started() as process:
        assert job.ended(process) == (0, "finished")
    attempt = job.attempt(process)
    assert (attempt / "output.txt").read_text() == f"rank 0 of 1 in {job.run}\n"
    for name in ("job.sh", "rank.sh", "work.json"):
        assert (attempt / name).read_bytes() == (job.folder / name).read_bytes()
    expected = "job.sh rank.sh work.json output.txt ended.json nodes.txt started.txt versions.txt modules.txt"
    assert {path.name for path in attempt.iterdir()} == {
        *expected.split(),
        "environment.txt",
        "commit.txt",
        "sha256.txt",
    }
    assert all(name.startswith("jobs/work/run/") for name in set(files(tmp_path)) - before)


@pytest.mark.parametrize("stop", [None, "USR1"])
def test_the_scripts_have_no_flaws_that_shellcheck_knows(tmp_path: Path, stop: str | None) -> None:
    job = stand_in(tmp_path, "", stop=stop)
    # What stands in for the ranks is no script of ours.
    (job.folder / "ranks.sh").unlink()
    check_shell(job.folder)


def test_ranks_that_stop_because_somebody_told_them(tmp_path: Path) -> None:
    job = stand_in(tmp_path, f"exit {STOPPED}\n")
    with job.started() as process:
        assert job.ended(process) == (STOPPED, "cancelled")


def test_ranks_that_fail(tmp_path: Path) -> None:
    job = stand_in(tmp_path, "exit 7\n")
    with job.started() as process:
        assert job.ended(process) == (7, "failed")


def test_ranks_that_stop_near_the_limit(tmp_path: Path) -> None:
    job = stand_in(tmp_path, RUNS + f"exit {STOPPED}\n")
    with job.started() as process:
        until((job.run / "running").exists)
        process.send_signal(signal.SIGUSR1)
        assert job.ended(process) == (STOPPED, "wall-limit")


def test_all_is_done_near_the_limit_only_if_the_ranks_say_so(tmp_path: Path) -> None:
    for script, reason in ((RUNS, "wall-limit"), (RUNS + """echo '{"state": "done"}' > rank-0.json\n""", "finished")):
        folder = tmp_path / reason
        folder.mkdir()
        job = stand_in(folder, script)
        with job.started() as process:
            until((job.run / "running").exists)
            process.send_signal(signal.SIGUSR1)
            assert job.ended(process) == (0, reason)


def test_ranks_that_go_on_near_the_limit_are_ended(tmp_path: Path) -> None:
    job = stand_in(tmp_path, ENDLESS, warn=2)
    with job.started() as process:
        until((job.run / "running").exists)
        # As LSF does it: to all that the script has started.
        os.killpg(process.pid, signal.SIGUSR1)
        assert job.ended(process) == (128 + signal.SIGTERM, "wall-limit")
    assert (job.run / STOP).exists()


def test_ranks_that_take_no_term_are_killed(tmp_path: Path) -> None:
    job = stand_in(tmp_path, "trap '' TERM\n" + ENDLESS, warn=0)
    script = (job.folder / "job.sh").read_text()
    assert script.count("SECONDS + 10") == 1
    (job.folder / "job.sh").write_text(script.replace("SECONDS + 10", "SECONDS + 1"))
    with job.started() as process:
        until((job.run / "running").exists)
        process.send_signal(signal.SIGTERM)
        assert job.ended(process) == (128 + signal.SIGKILL, "cancelled")


def test_a_framework_that_waits_for_a_signal_gets_it(tmp_path: Path) -> None:
    job = stand_in(tmp_path, "trap 'touch told; exit 0' USR1\n" + ENDLESS, stop="USR1")
    with job.started() as process:
        until((job.run / "running").exists)
        process.send_signal(signal.SIGUSR1)
        assert job.ended(process) == (0, "wall-limit"), "it says 0 when it was told to end, too"
    assert (job.run / "told").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_job_ends_its_ranks(tmp_path: Path, number: signal.Signals) -> None:
    job = stand_in(tmp_path, ENDLESS)
    with job.started() as process:
        until((job.run / "running").exists)
        process.send_signal(number)
        assert job.ended(process) == (128 + signal.SIGTERM, "cancelled")


def test_a_job_that_is_killed_says_nothing_and_the_next_start_goes_on_beside_it(tmp_path: Path) -> None:
    job = stand_in(tmp_path, "echo started >> starts\n" + RUNS)
    with job.started() as process:
        until((job.run / "running").exists)
        (job.run / "rank-0.alive").touch()
        process.kill()
        process.wait(60)
    first = job.attempt(process)
    assert not (first / "ended.json").exists()
    left = files(first)
    (job.run / STOP).touch()
    (job.run / "running").unlink()
    with job.started() as process:
        until((job.run / "running").exists)
        assert not (job.run / STOP).exists(), "it would stop at once"
        assert not (job.run / "rank-0.alive").exists()
        process.send_signal(signal.SIGUSR1)
        assert job.ended(process) == (0, "wall-limit")
    assert files(first) == left
    assert (job.run / "starts").read_text() == "started\n" * 2


def test_a_second_start_beside_a_live_one_is_refused(tmp_path: Path) -> None:
    job = stand_in(tmp_path, "sleep 30 &\n" + RUNS)
    with job.started() as process:
        until((job.run / "running").exists)
        second = subprocess.run(
            ["bash", "job.sh"], cwd=job.folder, env=job.environment, capture_output=True, text=True, check=False
        )
        assert (second.returncode, "another start of this job still runs" in second.stderr) == (2, True)
        assert list(job.run.glob("attempt-*")) == [job.attempt(process)]
        (job.run / STOP).touch()
        assert process.wait(60) == 0
        # What the ranks left behind holds no lock.
        third = subprocess.run(["flock", "-n", str(job.run / ".lock"), "true"], check=False)
        assert third.returncode == 0


def test_submit_all_is_axonn_submit(tmp_path: Path) -> None:
    job = stand_in(tmp_path, "")
    (tmp_path / "bin" / "axonn").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin" / "axonn").chmod(0o755)
    script = job.folder.parent / "submit-all.sh"
    found = subprocess.run(["bash", script], env=job.environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["submit", str(job.folder.parent)]


def test_an_id_that_comes_again_overwrites_nothing(tmp_path: Path) -> None:
    job = stand_in(tmp_path, "echo one\n")
    script = (job.folder / "job.sh").read_text()
    assert script.count('job="$$"') == 1
    (job.folder / "job.sh").write_text(script.replace('job="$$"', 'job="8"'))
    for name in ("attempt-8", "attempt-8-2", "attempt-8-3"):
        with job.started() as process:
            assert process.wait(60) == 0
        assert json.loads((job.run / name / "ended.json").read_text())["job"] == "8"
    assert len(list(job.run.glob("attempt-*"))) == 3


# --- our own ranks


def uninterrupted(comm: Any, config: TrainConfig, folder: Path) -> None:
    """A job of the rank pool: a run that nothing interrupts, with its state at the end as a checkpoint."""
    grid = config.grid
    with connect(grid, comm=comm, transport=config.transport) as runtime:
        trainer = EngineTrainer(config, runtime, None)
        spans = SpanRecorder(runtime.rank, folder=folder / f"spans-{runtime.rank}.parquet")
        TrainingLoop(config, trainer, runtime=runtime, spans=spans, folder=folder).run(0)


def state_of(run: Path) -> tuple[int, dict[str, torch.Tensor]]:
    newest = latest(run / CHECKPOINTS)
    assert newest is not None
    return newest.state.batches, load_whole(newest.folder, "master.")


@pytest.mark.full
def test_our_ranks_stop_near_the_limit_and_go_on_to_what_they_would_have_come_to(
    pool: RankPool, tmp_path: Path
) -> None:
    # The checkpoint at the end is only to compare; the one of the stop is none of `every`.
    config = tiny(inter=2, steps=4, checkpoints={"every": 100})
    whole = tmp_path / "whole"
    whole.mkdir()
    pool.run(uninterrupted, config, whole, ranks=2)

    launch = launch_worker("axonn", config, checkpoint=NEWEST, stoppable=True)
    job = JobFolder(tmp_path, launch, config=config, launcher=load_launcher("mpiexec"))
    job.environment = rank_environment(os.environ) | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    # The ranks wait until they may begin, so that they are stopped after the first batch.
    begins = 'touch "waits-$RANK"\nuntil [ -e stop ] || [ -e go ]; do sleep 0.1; done\nexec'
    script = (job.folder / "rank.sh").read_text()
    (job.folder / "rank.sh").write_text(script.replace("exec", begins))
    with job.started() as process:
        until(lambda: all((job.run / f"waits-{rank}").exists() for rank in range(2)))
        process.send_signal(signal.SIGUSR1)
        ended = job.ended(process)
    assert ended == (STOPPED, "wall-limit"), (job.attempt(process) / "output.txt").read_text()
    states = [json.loads((job.run / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [state["state"] for state in states] == ["stopped"] * 2
    assert all(state["memory_bytes"] > 0 and state["bytes_per_batch"] for state in states)
    assert state_of(job.run)[0] == 1
    read = read_run(files_of(job.run))
    assert (len(read.seconds), read.finished, read.failure) == (1, False, None)

    # As if it had died after two batches more, the last of them half written.
    with open(job.run / BATCHES, "a") as file:
        file.write('{"step": 1, "loss": 9.0, "seconds": 9.0}\n{"step": 2, "lo')
    (job.run / "go").touch()
    with job.started() as process:
        ended = job.ended(process)
    assert ended == (0, "finished"), (job.attempt(process) / "output.txt").read_text()
    rows = read_rows(job.run / BATCHES)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row.get("first") for row in rows] == [True, True, None, None]
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_rows(whole / BATCHES)]
    for (done, tensors), (other, expected) in [(state_of(job.run), state_of(whole))]:
        assert done == other == 4
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    for rank in range(2):
        steps = {span.step for span in read_spans(job.run / f"spans-{rank}.parquet")}
        assert steps == {0, 1, 2, 3}
    assert list(read_run(files_of(job.run)).starts) == [0, 1]


def test_a_folder_without_a_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / BATCHES).write_text('{"step": 0, "loss": 1.0, "seconds": 1.0}\n')
    (tmp_path / "spans-0.parquet").mkdir()
    (tmp_path / CHECKPOINTS / ".step-00000002.writing").mkdir(parents=True)
    (tmp_path / "spec.json").touch()
    assert newest_checkpoint(tmp_path) is None
    assert sorted(path.name for path in tmp_path.rglob("*")) == [CHECKPOINTS, "spec.json"]
