"""The number of a process on its node, from its launcher's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "LOCAL_RANK")
"""Variables in which launchers tell a process its number on its node."""


def local_rank(environment: Mapping[str, str] | None = None) -> int:
    """Return the number of this process on its node as the launcher's environment says; 0 without a launcher."""
    env = os.environ if environment is None else environment
    return next((int(env[name]) for name in LOCAL_RANKS if name in env), 0)
