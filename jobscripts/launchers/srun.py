"""srun, of Slurm."""

from __future__ import annotations

from jobscripts.launchers import Launcher
from jobscripts.schedulers import Resources


class Srun(Launcher):
    name = "srun"
    variables = {"RANK": "$SLURM_PROCID", "WORLD_SIZE": "$SLURM_NTASKS", "LOCAL_RANK": "$SLURM_LOCALID"}

    def command(self, resources: Resources, options: list[str]) -> list[str]:
        r = resources
        return [
            "srun",
            f"--nodes={r.nodes}",
            f"--ntasks={r.ranks}",
            f"--ntasks-per-node={r.ranks_per_node}",
            f"--cpus-per-task={r.cores_per_rank}",
            "--kill-on-bad-exit=1",
            *options,
        ]


LAUNCHER = Srun
