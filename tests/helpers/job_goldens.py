"""Job folders beside those under goldens/jobs: every scheduler with every launcher that it starts, all frameworks.

`python -m tests.helpers.job_goldens` writes them anew; what it changes is to be read in the difference.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from jobscripts.job_plan import JobPlan
from tests.helpers.cluster_jobs import planned, planned_small, write

GOLDENS = Path(__file__).parents[1] / "goldens" / "jobs"
HOW = "if the change is meant, write the goldens anew with: python -m tests.helpers.job_goldens"


class Golden(NamedTuple):
    """One job. `small`: of what the experiment measures on one machine."""

    machine: str
    scheduler: str
    launcher: str
    job: str
    small: bool = False

    @property
    def name(self) -> str:
        return f"{self.scheduler}-{self.launcher}"

    def plan(self) -> JobPlan:
        found = (planned_small if self.small else planned)("fig6", self.machine)
        (job,) = [job for job in found.jobs if job.name == self.job]
        return JobPlan(jobs=[job])


ALL = [
    Golden("perlmutter", "slurm", "srun", "gpt-12b-48-axonn"),
    Golden("perlmutter", "slurm", "mpiexec", "gpt-12b-48-megatron-lm"),
    Golden("perlmutter", "slurm", "hydra", "gpt-12b-48-deepspeed"),
    Golden("summit", "lsf", "jsrun", "gpt-12b-48-megatron-lm"),
    Golden("summit", "lsf", "mpiexec", "gpt-8x256-2r-pytorch-1f1b", small=True),
    Golden("summit", "lsf", "hydra", "gpt-12b-48-axonn"),
    Golden("summit", "none", "mpiexec", "gpt-12b-48-deepspeed"),
    Golden("frontier", "none", "hydra", "gpt-8x256-2r-pytorch-1f1b", small=True),
]
"""A scheduler does not start the launcher of another."""


def write_golden(golden: Golden, folder: Path) -> None:
    write(golden.plan(), folder, machine=golden.machine, scheduler=golden.scheduler, launcher=golden.launcher)


def tree(folder: Path) -> dict[str, bytes]:
    """Contents by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    shutil.rmtree(GOLDENS, ignore_errors=True)
    for one in ALL:
        write_golden(one, GOLDENS / one.name)
