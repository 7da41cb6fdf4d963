"""Diagnosis of the transports that work on this machine, for `axonn doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch
import torch.distributed as dist

from axonn.distributed.launch import rank_environment

_PATIENCE_S = 60.0


class Finding(NamedTuple):
    """Result of trying a transport on this machine: `works`, and a `text` that says how or why not."""

    transport: str
    works: bool
    text: str


def diagnose() -> list[Finding]:
    """Return one finding for each transport that `axonn.distributed.runtime.connect` offers."""
    return [_mpi(), _torch()]


def _mpi() -> Finding:
    # In a process of its own: an MPI that cannot start ends the process that tries.
    command = [sys.executable, "-m", "axonn.distributed.transport.gpu_aware"]
    try:
        # Without a launcher, Open MPI leaves its session folder and shared memory behind, however the process ends.
        with tempfile.TemporaryDirectory() as scratch:
            env = rank_environment(os.environ) | {"TMPDIR": scratch, "OMPI_MCA_btl_sm_backing_directory": scratch}
            answer = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding("mpi", False, f"MPI did not start within {_PATIENCE_S:.0f} s")
    try:
        mpi = json.loads(answer.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = answer.stderr.strip().splitlines()[-1:] or [f"MPI ended the process with code {answer.returncode}"]
        return Finding("mpi", False, f"{reason[0]}; install it with: pip install 'axonn-reproduction[mpi]'")
    gpu_aware = mpi["gpu_aware"]
    gpu_tensors = (
        "takes GPU memory itself"
        if gpu_aware is True
        else f"GPU tensors would pass through pinned host memory: {gpu_aware}"
    )
    return Finding("mpi", True, f"{mpi['library']}; {gpu_tensors}")


def _torch() -> Finding:
    if not dist.is_available() or not dist.is_gloo_available():
        return Finding("torch", False, f"torch {torch.__version__} was built without Gloo, which headers need")
    if not dist.is_nccl_available():
        return Finding("torch", True, f"gloo for CPU tensors; no nccl in torch {torch.__version__}, so none of a GPU")
    return Finding("torch", True, "gloo for CPU tensors, nccl for those of GPUs")
