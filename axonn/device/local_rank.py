"""The local rank: the number of a process on its node, from the launcher's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "LOCAL_RANK")
"""Environment variables in which launchers give a process its local rank."""


def local_rank(environment: Mapping[str, str] | None = None) -> int:
    """Return the local rank of this process from the launcher's environment; 0 without a launcher."""
    env = os.environ if environment is None else environment
    return next((int(env[name]) for name in LOCAL_RANKS if name in env), 0)
