"""mpiexec, of MPICH and its derivatives (Hydra)."""

from __future__ import annotations

from jobscripts.launchers import Launcher
from jobscripts.schedulers import Resources


class Hydra(Launcher):
    name = "hydra"
    variables = {"RANK": "$PMI_RANK", "WORLD_SIZE": "$PMI_SIZE", "LOCAL_RANK": "$MPI_LOCALRANKID"}

    def command(self, resources: Resources, options: list[str]) -> list[str]:
        r = resources
        return ["mpiexec", "-n", str(r.ranks), "-ppn", str(r.ranks_per_node), *options]


LAUNCHER = Hydra
