"""Fresh clones: the files of the project alone in a folder of their own, and what lies in a folder before and after."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from experiments.definition import ROOT

NOT_OF_A_CLONE = {".venv", ".baselines", ".git", "runs", "build", "jobs"}
_BYTECODE = "__pycache__"


def copy_of_the_project(folder: Path) -> Path:
    """The files of the project alone, without what was built, measured or drawn in it."""

    def ignored(parent: str, names: list[str]) -> set[str]:
        top = Path(parent) == ROOT
        drop = {n for n in names if n.endswith((".egg-info", "_cache")) or n == _BYTECODE}
        drop |= NOT_OF_A_CLONE & set(names) if top else set()
        if Path(parent) == ROOT / "results":
            drop |= set(names) - {"published"}
        if Path(parent) == ROOT / "plots":
            drop |= {"out"} & set(names)
        return drop | ({"local.yaml", "local-gpu.yaml"} & set(names) if Path(parent).name == "machines" else set())

    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def newcomers_environment(monkeypatch: pytest.MonkeyPatch, *, path: Path) -> None:
    """As a newcomer's terminal, who may be root, and not this process's. The modules are those of `path`."""
    for name in list(os.environ):
        if name.startswith(("AXONN", "PYTEST", "OMPI_", "PRTE_", "PMIX_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(path))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below `folder`, by its name; bytecode is nobody's."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and _BYTECODE not in path.parts:
            status = path.stat()
            found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found
