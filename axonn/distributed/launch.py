"""How the ranks of a job are started on one machine: the MPI launcher's command line and the ranks' environment."""

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
"""Variables in which launchers tell a process its rank and the number of ranks."""


def find_mpiexec() -> str:
    """The mpiexec beside the running Python, or the first on the path. Raises `LaunchError` when there is none."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise LaunchError(
            "there is no mpiexec: several ranks need MPI; install it with pip install 'axonn-reproduction[mpi]', "
            "or load your site's MPI module"
        )
    return found


def mpiexec_command(
    ranks: int,
    command: Sequence[str],
    *,
    link_only: bool = False,
    own_cores: bool = False,
    mpiexec: str | None = None,
) -> list[str]:
    """Command that starts `command` on `ranks` ranks of this machine.

    `link_only` keeps MPI off shared memory, so that all messages cross the loopback interface (to emulate a slow link).
    `own_cores` keeps each rank on a core of its own, for timings: two jobs that do so share the first cores. `mpiexec`:
    another launcher than `find_mpiexec`.
    """
    options = ["--bind-to", "core" if own_cores else "none"]
    if link_only:
        options += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo"]
    return [mpiexec or find_mpiexec(), "-n", str(ranks), *options, *command]


_FORCING_COLOURS = ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "PYTHON_COLORS", "TTY_COMPATIBLE")


def rank_environment(base: Mapping[str, str], *, threads: int = 1) -> dict[str, str]:
    """Environment for ranks that share this machine's cores: `threads` each, and Open MPI that yields when idle.

    What an outer launcher says about this process is left out: the ranks are those of their own launcher. So is what
    asks for colours: what ranks print goes to a file.
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
