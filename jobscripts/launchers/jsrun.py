"""jsrun, of IBM's Job Step Manager: one resource set per node."""

from __future__ import annotations

from jobscripts.launchers import Launcher
from jobscripts.schedulers import Resources


class Jsrun(Launcher):
    name = "jsrun"
    launch_node = True
    variables = {
        "RANK": "$OMPI_COMM_WORLD_RANK",
        "WORLD_SIZE": "$OMPI_COMM_WORLD_SIZE",
        "LOCAL_RANK": "$OMPI_COMM_WORLD_LOCAL_RANK",
    }

    def command(self, resources: Resources, options: list[str]) -> list[str]:
        r = resources
        return [
            "jsrun",
            *options,
            "-n",
            str(r.nodes),
            "-r",
            "1",
            "-a",
            str(r.ranks_per_node),
            "-g",
            str(r.gpus_per_node),
            "-c",
            str(r.ranks_per_node * r.cores_per_rank),
            "-b",
            f"packed:{r.cores_per_rank}",
            "-d",
            "packed",
        ]


LAUNCHER = Jsrun
