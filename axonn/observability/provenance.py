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
from typing import Any, Literal

from axonn.observability.procfs import available_cores
from axonn.observability.records import Machine
from axonn.training.places import ROOT

THIS_MACHINE = "this machine"
"""Name of the machine in records of runs that were not on a cluster."""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of the checkout, with '+' when it has local changes; None outside of a checkout."""
    if not (ROOT / ".git").exists():
        return None  # Installed, maybe below a repository of somebody else's.
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "--no-optional-locks", "status", "--porcelain"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
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


_CLOCKS = {"clocks.sm": "sm_mhz", "clocks.max.sm": "sm_max_mhz", "power.limit": "power_limit_w"}


def gpu_facts() -> dict[str, Any]:
    """Name, driver and clocks of the first GPU as nvidia-smi says, without those that it does not say."""
    asked = ["name", "driver_version", *_CLOCKS]
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    first = next(iter(printed.strip().splitlines()), "")
    said = dict(zip(asked, (value.strip() for value in first.split(",")), strict=False))
    facts: dict[str, Any] = {}
    for name, key in (("name", "device"), ("driver_version", "driver")):
        if said.get(name) and "N/A" not in said[name]:
            facts[key] = said[name]
    clocks = {}
    for name, key in _CLOCKS.items():
        try:
            clocks[key] = float(said.get(name, ""))
        except ValueError:
            # "[N/A]", where the driver does not tell.
            continue
    return facts | ({"clocks": clocks} if clocks else {})


@cache
def this_machine(*, device: Literal["cpu", "cuda"] = "cpu") -> Machine:
    """The machine that this process runs on. `device`: what its ranks compute on, a GPU being told with its clocks."""
    gpu: dict[str, Any] = {}
    if device == "cuda":
        import torch

        gpu = gpu_facts()
        if "device" not in gpu:
            # Only where the driver does not tell: asking PyTorch takes memory of the GPU for as long as this process.
            gpu["device"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cuda"
        gpu["cuda"] = torch.version.cuda
    openmpi, mpich = _version("openmpi"), _version("mpich")
    return Machine(
        name=THIS_MACHINE,
        host=platform.node(),
        cpu=cpu_name(),
        cores=available_cores(),
        device=gpu.get("device", "cpu"),
        driver=gpu.get("driver"),
        cuda=gpu.get("cuda"),
        clocks=gpu.get("clocks"),
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
