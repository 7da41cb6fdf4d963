"""Launch of ranks on one machine: the command line of mpiexec and the environment of the ranks."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from axonn.device.local_rank import LOCAL_RANKS
from axonn.errors import LaunchError

LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("RANK", "WORLD_SIZE"),
)
"""Environment variables in which launchers give a process its rank and the number of ranks."""


def find_mpiexec() -> str:
    """Return the mpiexec beside the running Python, or the first on the path. Raises `LaunchError` if there is none."""
    sibling = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(sibling) if sibling.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise LaunchError(
            "there is no mpiexec: several ranks need MPI; install it with pip install 'axonn-reproduction[mpi]', "
            "or load your site's MPI module"
        )
    return mpiexec


def mpiexec_command(
    ranks: int,
    command: Sequence[str],
    *,
    link_only: bool = False,
    own_cores: bool = False,
    mpiexec: str | None = None,
) -> list[str]:
    """Return the command line that starts `command` on `ranks` ranks of this machine.

    `link_only` keeps MPI off shared memory, so that all messages cross the loopback interface (to emulate a slow link).
    `own_cores` binds each rank to a core, for timings; two such jobs would share the first cores. `mpiexec`: launcher
    to use instead of `find_mpiexec`.
    """
    options = ["--bind-to", "core" if own_cores else "none"]
    if link_only:
        options += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo"]
    return [mpiexec or find_mpiexec(), "-n", str(ranks), *options, *command]


_FORCING_COLOURS = ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "PYTHON_COLORS", "TTY_COMPATIBLE")


def rank_environment(base: Mapping[str, str], *, threads: int = 1) -> dict[str, str]:
    """Return the environment of ranks that share this machine's cores: `threads` each; Open MPI yields when idle.

    Variables of an outer launcher are removed, since the ranks get theirs from their own launcher, and so are requests
    for colours, since the output of ranks goes to a file.
    """
    outer = {name for names in LAUNCHERS for name in names} | set(LOCAL_RANKS) | set(_FORCING_COLOURS)
    env = {name: value for name, value in base.items() if name not in outer}
    env.update(
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe",
        OMPI_MCA_mpi_yield_when_idle="1",
        PYTHONUNBUFFERED="1",
        NO_COLOR="1",
    )
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # Open MPI refuses root by default; inside a container root is the normal user.
        env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return env
