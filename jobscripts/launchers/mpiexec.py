"""mpiexec, of Open MPI."""

from __future__ import annotations

from collections.abc import Sequence

from jobscripts.launchers import Launcher
from jobscripts.schedulers import Resources


class Mpiexec(Launcher):
    name = "mpiexec"
    variables = {
        "RANK": "$OMPI_COMM_WORLD_RANK",
        "WORLD_SIZE": "$OMPI_COMM_WORLD_SIZE",
        "LOCAL_RANK": "$OMPI_COMM_WORLD_LOCAL_RANK",
    }

    def command(self, resources: Resources, options: list[str]) -> list[str]:
        r = resources
        # By default it binds each of one or two ranks to a single core.
        placed = ["--map-by", f"ppr:{r.ranks_per_node}:node", "--bind-to", "none"]
        return ["mpiexec", "-n", str(r.ranks), *placed, *options]

    def forwarded(self, variables: Sequence[str]) -> list[str]:
        return [word for name in variables for word in ("-x", name)]


LAUNCHER = Mpiexec
