"""Jobs on a real Slurm cluster of four nodes, from the experiment file to the figure, and what may befall them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from axonn.observability.records import Record
from axonn.training.metrics import BATCHES, read_rows
from experiments import definition, runner
from experiments.predictor import predict_experiment
from jobscripts import submission
from jobscripts.collection import collect
from jobscripts.submission import Standing
from plots import figure
from plots.figure import make_figure
from plots.figures import fig6
from plots.summary import machine_of
from tests.helpers.command_line import CommandLine
from tests.slurm.cluster import FOUR_NODES, Cluster, cluster, unavailable

pytestmark = pytest.mark.slurm
SYSTEM = Path(__file__).with_name("four-nodes.yaml")
ENDLESS = 1_000_000
TINY = {"layers": 2, "hidden": 16, "heads": 2, "seq_len": 16, "vocab": 256}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if said := unavailable():
        pytest.skip(said)
    with (
        pytest.MonkeyPatch.context() as patch,
        cluster(tmp_path_factory.mktemp("slurm"), FOUR_NODES) as running,
    ):
        for name, value in running.environment.items():
            patch.setenv(name, value)
        # Jobs have the environment in which they were submitted.
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(definition.ROOT))
        yield running


@dataclass(frozen=True)
class Jobs:
    """A folder of jobs on the cluster."""

    folder: Path
    cluster: Cluster

    def standing(self, name: str) -> Standing:
        return next(one for one in submission.standings(self.folder) if one.entry.name == name)

    def submit(self, name: str) -> str:
        """The new id."""
        ((_, job),) = submission.submit(self.folder, only=[name])
        return job

    def batches(self, name: str) -> int:
        path = self.folder / name / "run" / BATCHES
        return len(read_rows(path)) if path.exists() else 0

    def wait(self, name: str, ready: Callable[[Standing], bool], *, seconds: float = 120) -> Standing:
        until = time.monotonic() + seconds
        while not ready(found := self.standing(name)):
            assert time.monotonic() < until, f"{name} stands so: {found}"
            time.sleep(0.2)
        return found

    def wait_for_batches(self, name: str, count: int = 1) -> None:
        self.wait(name, lambda one: self.batches(name) >= count or not one.live)
        assert self.standing(name).live

    def record(self, name: str) -> Record:
        found = collect(self.folder, results=self.folder.with_name("measured"), command="axonn collect")
        (one,) = [one for one in found if one.entry.name == name]
        assert one.record is not None, one.why
        return one.record

    def ends_whole(self, name: str) -> None:
        """Once submitted again, or left alone."""
        self.wait(name, lambda one: not one.live)
        record = self.record(name)
        assert record.failure is None
        assert record.batch_time_s is not None
        assert record.machine.name == "four-nodes"


def write_jobs(folder: Path, running: Cluster, *, batches: int, runs: dict[str, Any], **site: Any) -> Jobs:
    """With `axonn jobs`, of an experiment of tiny runs."""
    folder.mkdir(parents=True, exist_ok=True)
    measured = {
        "defaults": {"model": {"name": "tiny", **TINY}, "batch_size": 4, "microbatch_size": 2},
        "runs": runs,
        "batches": batches,
        "warmup_batches": 1,
        "repeats": 1,
        "loss_tolerance": 1e-4,
    }
    experiment = {"name": "faults", "title": "Faults", "about": "Jobs that are disturbed.", "runs": measured}
    (folder / "faults.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    (folder / "site.yaml").write_text(yaml.safe_dump(site), encoding="utf-8")
    options = ["--small", "--machine", str(SYSTEM), "--site", str(folder / "site.yaml"), "--out", str(folder / "jobs")]
    program = "from axonn.cli.main import main; main()"
    subprocess.run(
        [sys.executable, "-c", program, "jobs", str(folder / "faults.yaml"), *options], check=True, timeout=100
    )
    return Jobs(folder / "jobs", running)


@pytest.fixture(scope="module")
def limited(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """A job without an end, which runs towards its wall limit while other tests do their work."""
    folder = tmp_path_factory.mktemp("limited")
    # Slurm's smallest limit; it looks at the limits twice a minute.
    jobs = write_jobs(folder, slurm, batches=ENDLESS, runs={"long": {}}, wall_time="0:01", warn="0:00:50")
    jobs.submit("long-axonn")
    return jobs


@pytest.fixture(scope="module")
def faults(slurm: Cluster, limited: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Jobs that last until they are disturbed, and end soon when they are not."""
    runs = {name: {"grid": {"inter": 2}} for name in ("cancelled", "node", "drained")}
    return write_jobs(tmp_path_factory.mktemp("faults"), slurm, batches=1000, runs=runs)


def test_a_cancelled_job_was_interrupted_and_is_submitted_again(faults: Jobs) -> None:
    first = faults.submit("cancelled-axonn")
    faults.wait_for_batches("cancelled-axonn")
    assert submission.to_submit(faults.folder, only=["cancelled-axonn"]) == []
    faults.cluster.run("scancel", first)
    found = faults.wait("cancelled-axonn", lambda one: not one.live)
    assert found.failed
    record = faults.record("cancelled-axonn")
    assert record.failure is not None
    assert record.failure.cause == "interrupted"
    assert faults.submit("cancelled-axonn") != first
    faults.ends_whole("cancelled-axonn")


def test_a_failed_node_ends_a_job_which_is_submitted_again(faults: Jobs) -> None:
    job = faults.submit("node-axonn")
    faults.wait_for_batches("node-axonn")
    nodes = faults.cluster.run("squeue", "-h", "-o", "%N", "-j", job).strip()
    # Not the one that runs the script.
    last = faults.cluster.run("scontrol", "show", "hostnames", nodes).split()[-1]
    faults.cluster.kill_node(last)
    try:
        found = faults.wait("node-axonn", lambda one: not one.live)
        assert found.state == "node-failure"
        record = faults.record("node-axonn")
        assert record.failure is not None
        assert record.failure.cause == "dead-rank"
        assert "node" in record.failure.detail
    finally:
        faults.cluster.revive_node(last)
    faults.submit("node-axonn")
    faults.ends_whole("node-axonn")


def test_jobs_wait_for_drained_nodes_and_say_so(
    faults: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults.cluster.run("scontrol", "update", "nodename=n[1-4]", "state=drain", "reason=test")
    faults.submit("drained-axonn")
    found = faults.wait("drained-axonn", lambda one: one.status is not None and one.status.reason not in (None, "None"))
    assert found.state == "waiting"
    assert submission.to_submit(faults.folder, only=["drained-axonn"]) == []
    _, said, _ = CommandLine(tmp_path, monkeypatch, capsys)("status", faults.folder)
    assert "waiting" in said
    faults.cluster.run("scontrol", "update", "nodename=n[1-4]", "state=resume")
    faults.ends_whole("drained-axonn")


def test_a_job_stops_before_its_wall_limit_and_goes_on_when_submitted_again(limited: Jobs) -> None:
    found = limited.wait("long-axonn", lambda one: not one.live)
    assert (found.state, found.reason) == ("timed-out", "wall-limit")
    record = limited.record("long-axonn")
    assert record.failure is not None
    assert record.failure.cause == "timeout"
    done = limited.batches("long-axonn")
    assert done
    job = limited.submit("long-axonn")
    limited.wait_for_batches("long-axonn", done + 1)
    steps = [row["step"] for row in read_rows(limited.folder / "long-axonn" / "run" / BATCHES)]
    assert steps == list(range(len(steps)))
    limited.cluster.run("scancel", job)
    limited.wait("long-axonn", lambda one: not one.live)


def test_figure_6_shows_what_the_cluster_measured(
    slurm: Cluster, axonn: CommandLine, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load((definition.HERE / "fig6.yaml").read_text(encoding="utf-8"))
    # The shape of the experiment, in sizes that take no time.
    content["measured"] |= {"layers_per_rank": 1, "hidden": 32, "heads": 2, "seq_len": 32, "vocab": 512, "batches": 4}
    experiment = elsewhere / "fig6.yaml"
    experiment.write_text(yaml.safe_dump(content), encoding="utf-8")
    folder = elsewhere / "jobs"
    assert axonn("jobs", experiment, "--small", "--machine", SYSTEM, "--out", folder)[0] == 0
    names = submission.to_submit(folder)
    assert len(names) == 6
    assert axonn("submit", folder)[0] == 0
    code, said, _ = axonn("status", folder, "--wait", "--every", "0.5")
    assert (code, said.count("finished")) == (0, 12)
    assert axonn("collect", folder)[0] == 0
    _, said, _ = axonn("submit", folder)
    assert "nothing to submit" in said

    # Records of other sizes than the experiment's are not drawn.
    loaded = definition.load_experiment(experiment)
    monkeypatch.setattr(figure, "load_experiment", lambda path: loaded)
    predict_experiment(loaded, command="test")
    make_figure(fig6.FIG6)
    rows = json.loads((elsewhere / "results" / "fig6" / "summary.json").read_text())["rows"]
    ours = [row for row in rows if row["kind"] == "measured" and machine_of(row) == "four-nodes"]
    assert {(row["framework"], row["gpus"]) for row in ours} == {
        (framework, ranks) for framework in ("AxoNN", "PyTorch 1F1B") for ranks in (1, 2, 4)
    }
    assert all(row["batch_time_s"] > 0 for row in ours)
    assert list(runner.MEASURED.glob("fig6-four-nodes-*.json"))
