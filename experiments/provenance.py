"""Where a result comes from: the machine, the versions, the commit, and a hash of everything it depends on."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from axonn.records import Machine
from experiments.definition import ROOT, available_cores

THIS_MACHINE = "this machine"
"""Name of the machine in records of runs that were not on a cluster."""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of the checkout, with '+' when it has local changes; None outside of a checkout."""
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+" if changed else "")


def cpu_name() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def this_machine() -> Machine:
    """The machine that this process runs on."""
    openmpi, mpich = _version("openmpi"), _version("mpich")
    return Machine(
        name=THIS_MACHINE,
        host=platform.node(),
        cpu=cpu_name(),
        cores=available_cores(),
        device="cpu",
        python=platform.python_version(),
        torch=_version("torch"),
        mpi=f"Open MPI {openmpi}" if openmpi else f"MPICH {mpich}" if mpich else None,
        commit=commit(),
        threads_per_rank=1,
    )


def fingerprint(settings: Any, sources: Iterable[Path]) -> str:
    """Hash of plain settings and of the content of source files."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def sources(*patterns: str) -> list[Path]:
    """Files of the repository that match any of the patterns."""
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
