from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

from tests.helpers.command_line import CommandLine, tiny
from tests.helpers.every_rank import run_ranks  # noqa: F401  A fixture of several files.
from tests.helpers.rank_pool import RankPool

if TYPE_CHECKING:
    from jobscripts.generate import ClusterJob


def _start_mpi() -> None:
    """Load MPI, as many tests do, where what it leaves of a process that no launcher started is removed."""
    left = tempfile.mkdtemp(prefix="axonn-tests-")
    atexit.register(shutil.rmtree, left, ignore_errors=True)
    variables = {"TMPDIR": left, "OMPI_MCA_btl_sm_backing_directory": left}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    with contextlib.suppress(ImportError, RuntimeError):
        from mpi4py import MPI  # noqa: F401
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


_start_mpi()
torch.set_num_threads(1)
# No test fails because a machine is slow.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Eight MPI ranks, started when the first test asks for them."""
    ranks = RankPool(8)
    yield ranks
    ranks.stop()


@pytest.fixture
def axonn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The `axonn` command, which leaves everything in a folder of its own."""
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Figures, records and runs go to an empty folder; published points stay where they are."""
    from experiments import predictor, runner
    from plots import figure, style

    monkeypatch.setattr(predictor, "PREDICTED", tmp_path / "results" / "predicted")
    monkeypatch.setattr(runner, "MEASURED", tmp_path / "results" / "measured")
    monkeypatch.setattr(runner, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(runner, "PROJECT", tmp_path)
    monkeypatch.setattr(figure, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(style, "OUT", tmp_path / "out")
    (tmp_path / "results" / "predicted").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, ClusterJob]:
    """One small job of two ranks that was written, and nothing more."""
    from tests.helpers.job_folders import small_job, written

    job = small_job("tiny-2r", "axonn", tiny(inter=2, steps=11))
    return written(tmp_path / "jobs", [job]), job
