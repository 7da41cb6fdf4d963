"""Test of whether MPI accepts GPU memory. Run as a program, it prints the MPI library and the result as JSON."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Mapping

import torch


def gpu_aware_mpi() -> bool | str:
    """Return True, or the reason why messages of GPU tensors go through host memory. Needs mpi4py, but no GPU."""
    from mpi4py import MPI

    library = ctypes.CDLL(MPI.__file__)  # Looks up symbols in the MPI library that it is linked with, too.
    symbol = "MPIX_Query_rocm_support" if torch.version.hip else "MPIX_Query_cuda_support"
    return judge(MPI.Get_library_version(), os.environ, symbol, getattr(library, symbol, None))


def judge(version: str, environment: Mapping[str, str], symbol: str, query: Callable[[], int] | None) -> bool | str:
    """Return the answer for the MPI library `version`, whose function `symbol` is `query` (None if it has none)."""
    if "CRAY" in version.upper():
        if environment.get("MPICH_GPU_SUPPORT_ENABLED") == "1":
            return True
        return "Cray MPICH takes GPU memory only with MPICH_GPU_SUPPORT_ENABLED=1 in the environment"
    if environment.get("MPIR_CVAR_ENABLE_GPU") == "0":
        return "MPIR_CVAR_ENABLE_GPU=0 in the environment switches it off"
    if query is None:
        return f"this MPI has no {symbol} to ask"
    return True if query() else "this MPI was built without GPU support, or finds no GPU library"


def main() -> None:
    """Print the result for this machine."""
    from mpi4py import MPI

    version = MPI.Get_library_version().split(",")[0].strip("\0 \n").splitlines()[0]
    print(json.dumps({"library": version, "gpu_aware": gpu_aware_mpi()}))


if __name__ == "__main__":
    main()
