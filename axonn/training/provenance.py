"""Provenance of a result: machine, versions, commit, and a hash of everything that it depends on."""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from axonn.config.model_config import ENTRY_POINTS
from axonn.observability.procfs import available_cores
from axonn.observability.records import Machine
from axonn.training.places import ROOT

PACKAGES = ("axonn", "experiments", "baselines", "plots", "jobscripts")
"""The suite's packages, whose code makes results."""
THIS_MACHINE = "this machine"
"""Machine name in records of runs that were not on a cluster."""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the checkout, with '+' if it has local changes; None outside of a checkout."""
    if not (ROOT / ".git").exists():
        return None  # Installed, perhaps inside of an unrelated repository.
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
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


_CLOCKS = {"clocks.sm": "sm_mhz", "clocks.max.sm": "sm_max_mhz", "power.limit": "power_limit_w"}


def gpu_facts() -> dict[str, Any]:
    """Return name, driver and clocks of the first GPU as nvidia-smi reports them, without those that it omits."""
    queried = ["name", "driver_version", *_CLOCKS]
    command = ["nvidia-smi", f"--query-gpu={','.join(queried)}", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    first = next(iter(printed.strip().splitlines()), "")
    values = dict(zip(queried, (value.strip() for value in first.split(",")), strict=False))
    facts: dict[str, Any] = {}
    for name, key in (("name", "device"), ("driver_version", "driver")):
        if values.get(name) and "N/A" not in values[name]:
            facts[key] = values[name]
    clocks = {}
    for name, key in _CLOCKS.items():
        try:
            clocks[key] = float(values.get(name, ""))
        except ValueError:
            # "[N/A]", where the driver does not say.
            continue
    return facts | ({"clocks": clocks} if clocks else {})


@cache
def this_machine(*, device: Literal["cpu", "cuda"] = "cpu") -> Machine:
    """Return the machine that this process runs on. `device`: that of its ranks; a GPU is described with its clocks."""
    gpu: dict[str, Any] = {}
    if device == "cuda":
        import torch

        gpu = gpu_facts()
        if "device" not in gpu:
            # Only where the driver does not say: asking PyTorch takes GPU memory for the lifetime of this process.
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
    """Return a hash of plain settings and of the content of source files."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def described_files(*patterns: str) -> list[Path]:
    """Return the suite's data files that match any of the patterns; code has `source_files`."""
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern)})


def source_files(*modules: str) -> list[Path]:
    """Return the suite's files that running these modules can import, the modules themselves included.

    Imports are followed wherever they stand in a file, except those for type checkers alone, and those in functions of
    an `__init__.py`, which imports lazily. Registered architectures count for every module that reads a model's
    configuration. `modules` may belong to other packages. Raises `ValueError` for one that does not exist.
    """
    reached: set[Path] = set()
    left: list[Path] = []
    for module in modules:
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ValueError(f"there is no module {module}")
        left.append(Path(spec.origin))
    while left:
        file = left.pop()
        if file not in reached:
            reached.add(file)
            left += _imported_files(file)
    return sorted(reached)


@cache
def _imported_files(file: Path) -> tuple[Path, ...]:
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    names = [name for statement in tree.body for name in _imports(statement, file)]
    if file == _file_of("axonn.config.model_config"):
        names += [entry.module for entry in entry_points(group=ENTRY_POINTS)]
    # A package is imported before its modules.
    names += [".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)]
    # Scripts that run by their path import each other by their names alone.
    siblings = [file.parent / f"{name}.py" for name in names if "." not in name]
    return tuple({path for path in (*map(_file_of, names), *siblings) if path is not None and path.exists()})


def _imports(node: ast.AST, file: Path) -> Iterator[str]:
    """Yield the full names of all that a statement imports: for `from a import b` both a and a.b."""
    lazy = isinstance(node, ast.FunctionDef) and file.name == "__init__.py" and file not in _architectures()
    if lazy or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = file.relative_to(ROOT).parts[: -node.level] if node.level and file.is_relative_to(ROOT) else ()
        module = ".".join([*above, *([node.module] if node.module else [])])
        yield from (module, *(f"{module}.{alias.name}" for alias in node.names))
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, file)


@cache
def _architectures() -> frozenset[Path | None]:
    return frozenset(_file_of(entry.module) for entry in entry_points(group=ENTRY_POINTS))


@cache
def _file_of(module: str) -> Path | None:
    """Return the suite's file of a module; None if it is not the suite's, or the name is not one of a module."""
    place = ROOT.joinpath(*module.split("."))
    if module.partition(".")[0] not in PACKAGES:
        return None
    return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)
