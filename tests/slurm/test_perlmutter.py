"""Scripts for Perlmutter, handed to a Slurm whose nodes claim to be Perlmutter's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.definition import HERE, load_experiment
from jobscripts.generate import write_jobs
from jobscripts.job_plan import plan_jobs
from jobscripts.launchers import load_launcher
from jobscripts.schedulers import load_scheduler
from jobscripts.site import Site
from jobscripts.system import load_system
from tests.helpers import cluster_jobs
from tests.slurm.cluster import PERLMUTTER, Cluster, cluster, unavailable

pytestmark = pytest.mark.slurm
SITES = {
    "partition": Site(account="m1234_g", queue="regular"),
    "quality of service": Site(account="m1234_g", options=["--qos=regular", "--constraint=gpu&hbm40g"]),
}


@pytest.fixture(scope="module")
def perlmutter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if said := unavailable():
        pytest.skip(said)
    with cluster(tmp_path_factory.mktemp("perlmutter"), PERLMUTTER) as running:
        yield running


def scripts(experiment: str, folder: Path, site: Site) -> list[Path]:
    """Of all points of an experiment on Perlmutter whose grid is stated: the planner takes long for others."""
    system = load_system("perlmutter")
    found = load_experiment(HERE / f"{experiment}.yaml")
    planned = plan_jobs(found, system=system, site=site)
    write_jobs(
        planned.jobs,
        folder,
        experiment=experiment,
        command="axonn jobs",
        system=system,
        site=site,
        scheduler=load_scheduler(system.scheduler),
        launcher=load_launcher(system.launcher),
    )
    return sorted(folder.glob("*/job.sh"))


def tested(running: Cluster, script: Path, *options: str) -> tuple[int, str]:
    """Exit status of a test of a script, and what was said."""
    result = subprocess.run(
        ["sbatch", "--test-only", *options, script.name],
        cwd=script.parent,
        env=os.environ | running.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return result.returncode, result.stderr


@pytest.mark.parametrize("site", SITES)
def test_scripts_are_accepted(perlmutter: Cluster, tmp_path: Path, site: str) -> None:
    found = scripts("fig5", tmp_path, SITES[site])
    assert found
    for script in found:
        code, said = tested(perlmutter, script)
        assert code == 0, f"{script.parent.name}: {said}"
        assert "to start at" in said


@pytest.mark.parametrize("experiment", ["fig3", "fig6", "fig7"])
def test_scripts_of_every_framework_are_accepted(perlmutter: Cluster, tmp_path: Path, experiment: str) -> None:
    plan = cluster_jobs.planned(experiment, "perlmutter")
    cluster_jobs.write(plan, tmp_path, machine="perlmutter")
    assert plan.jobs
    for job in plan.jobs:
        code, said = tested(perlmutter, tmp_path / job.name / "job.sh")
        assert code == 0, f"{job.name}: {said}"
        assert f"on nodes n[1-{job.resources.nodes}]" in said
    # Figure 7's larger points differ in their nodes alone; all of them take minutes to plan.
    for nodes in (32, 64, 1536):
        assert tested(perlmutter, tmp_path / plan.jobs[0].name / "job.sh", f"--nodes={nodes}")[0] == 0


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("--constraint=mi250", "Invalid feature specification"),
        ("--gpus-per-node=5", "Requested node configuration is not available"),
        ("--cpus-per-task=64", "Requested node configuration is not available"),
        ("--nodes=1537", "Requested node configuration is not available"),
        ("--partition=large", "invalid partition specified"),
    ],
)
def test_what_the_machine_does_not_have_is_refused(perlmutter: Cluster, tmp_path: Path, wrong: str, why: str) -> None:
    (script, *_) = scripts("fig5", tmp_path, SITES["partition"])
    code, said = tested(perlmutter, script, wrong)
    assert code != 0
    assert why in said
