"""Every script that is written is sound shell and asks the scheduler for just what `--dry-run` says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from experiments.definition import HERE, ROOT, load_experiment
from jobscripts.job_plan import JobPlan, node_hours, plan_jobs
from jobscripts.launchers import launcher_names
from jobscripts.schedulers import scheduler_names
from jobscripts.site import load_site
from jobscripts.system import load_system, systems
from tests.helpers.cluster_jobs import FEW, check_shell, few, planned, planned_small, site, write
from tests.helpers.scheduler_options import read_script, requested

# The ranks of fig5 and fig7 do not fill Summit's nodes of 6 GPUs (tests of refusals have fig5).
PUBLISHED = [
    *[("fig6", machine) for machine in systems()],
    *[("fig3", machine) for machine in systems()],
    ("fig5", "perlmutter"),
    ("fig5", "frontier"),
    ("fig7", "perlmutter"),
]


def test_the_site_file_of_the_page(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(# summit-site.yaml\n.*?)```", (ROOT / "docs" / "jobs.md").read_text(), re.DOTALL)
    (tmp_path / "my-site.yaml").write_text(text)
    own, system = load_site(tmp_path / "my-site.yaml"), load_system("summit")
    own.require(system.needs, where="docs/jobs.md", machine="summit")
    plan = plan_jobs(few("fig6"), system=system, site=own)
    plan.require(own, where="docs/jobs.md")
    assert plan.warnings == []
    write(plan, tmp_path / "jobs", machine="summit", own=own)
    check_shell(tmp_path / "jobs")


def check_requests(plan: JobPlan, folder: Path, *, launcher: str, scheduler: str) -> None:
    """Against what the table of --dry-run shows, and the site."""
    own = site()
    hours = 0.0
    for job in plan.jobs:
        asked = requested(read_script((folder / job.name / "job.sh").read_text(), launcher=launcher))
        r = job.resources
        assert (asked.nodes, asked.ranks) == (r.nodes, job.work.gpus)
        if scheduler != "none":
            assert asked.name == job.name
            assert (asked.seconds, asked.warn_seconds) == (own.seconds, own.warn_seconds)
            assert (asked.account, asked.queue) == (own.account, own.queue)
            hours += asked.nodes * (asked.seconds or 0) / 3600
        if scheduler == "slurm" or launcher == "jsrun":
            assert asked.gpus == r.nodes * r.gpus_per_node
            assert asked.cores_per_rank == r.cores_per_rank
    assert scheduler == "none" or hours == pytest.approx(node_hours(plan.jobs))


@pytest.mark.parametrize(("experiment", "machine"), PUBLISHED)
def test_published_points(experiment: str, machine: str, tmp_path: Path) -> None:
    plan, system = planned(experiment, machine), load_system(machine)
    write(plan, tmp_path, machine=machine)
    check_requests(plan, tmp_path, launcher=system.launcher, scheduler=system.scheduler)
    check_shell(tmp_path)


@pytest.mark.parametrize("machine", systems())
def test_small_points(machine: str, tmp_path: Path) -> None:
    system = load_system(machine)
    for experiment in FEW:
        plan, folder = planned_small(experiment, machine), tmp_path / experiment
        write(plan, folder, machine=machine)
        check_requests(plan, folder, launcher=system.launcher, scheduler=system.scheduler)
    check_shell(tmp_path)


@pytest.mark.parametrize("launcher", launcher_names())
@pytest.mark.parametrize("scheduler", scheduler_names())
def test_every_scheduler_with_every_launcher(scheduler: str, launcher: str, tmp_path: Path) -> None:
    plan = planned("fig6", "summit")
    write(plan, tmp_path, machine="summit", scheduler=scheduler, launcher=launcher)
    check_requests(plan, tmp_path, launcher=launcher, scheduler=scheduler)


@pytest.mark.full
@pytest.mark.parametrize("experiment", FEW)
@pytest.mark.parametrize("machine", systems())
def test_all_published_points(experiment: str, machine: str, tmp_path: Path) -> None:
    if machine == "summit" and experiment in ("fig5", "fig7"):
        pytest.skip("its ranks do not fill nodes of 6")
    system = load_system(machine)
    plan = plan_jobs(load_experiment(HERE / f"{experiment}.yaml"), system=system, site=site())
    write(plan, tmp_path, machine=machine)
    check_requests(plan, tmp_path, launcher=system.launcher, scheduler=system.scheduler)
    check_shell(tmp_path)


def test_a_script_says_what_the_shell_makes_of_it(tmp_path: Path) -> None:
    """Variables, quotes, spaces and signs of the site reach the ranks as they are written."""
    plan = planned("fig6", "summit")
    folder = tmp_path / "jobs"
    write(plan, folder, machine="summit")
    (job,) = [job for job in plan.jobs if job.framework == "Megatron-LM"]
    lines = (folder / job.name / "job.sh").read_text().splitlines()
    exports = "\n".join(line for line in lines if line.startswith("export ") and "=" in line)
    shown = 'printf "%s\\n" "$LD_LIBRARY_PATH" "$A_NOTE"'
    found = subprocess.run(
        ["bash", "-euc", f"{exports}\n{shown}"], capture_output=True, text=True, check=True, env={"PATH": "/bin"}
    )
    assert found.stdout.splitlines() == ['/work/my "own" suite/rccl/lib:', "it's `not` run; back\\slash & > * #"]

    (folder / job.name / "run").mkdir()
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "apptainer").write_text('#!/bin/bash\nprintf "%s\\n" "$RANK" "$@"\n')
    (bin_ / "apptainer").chmod(0o755)
    found = subprocess.run(
        ["bash", "rank.sh"],
        cwd=folder / job.name,
        capture_output=True,
        text=True,
        check=True,
        env={
            "PATH": f"{bin_}:/usr/bin:/bin",
            "HOME": "/home/me & you",
            **{f"OMPI_COMM_WORLD_{name}": "7" for name in ("RANK", "SIZE", "LOCAL_RANK")},
        },
    )
    words = found.stdout.splitlines()
    assert words[:5] == ["7", "exec", "--nv", "--bind=/home/me & you/data:/data", "my image.sif"]
    assert words[5:8] == ["python", "-u", "/home/me & you/Megatron LM/pretrain_gpt.py"]
