"""A disk that is full or cannot be written: the run ends and says so, and goes on when there is room again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from axonn.checkpoint.checkpoints import latest
from axonn.config.train_config import CheckpointConfig, DataConfig, TrainConfig
from axonn.models.weights_file import read_weights
from axonn.training.resumption import CHECKPOINTS
from axonn.training.run_folder import set_state
from axonn.training.run_outcome import Outcome
from axonn.training.supervision.supervisor import supervise
from tests.helpers.command_line import TEXT, CommandLine, tiny

FULL = "No space left on device"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "axonn-test", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"only root can mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave nothing free."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass


class FillsAfter:
    """Fills the disk once so many batches are done."""

    def __init__(self, disk: Path, batches: int) -> None:
        self._disk, self._batches = disk, batches

    def __call__(self, done: int) -> None:
        if done >= self._batches and not (self._disk / "filler").exists():
            fill(self._disk)


def config_of(**changes: object) -> TrainConfig:
    # Many batches: the disk is to be full long before the last.
    return tiny(steps=400, data=DataConfig(path=str(TEXT)), **changes)


def check_goes_on(folder: Path, config: TrainConfig, whole: Outcome, *, last: Path) -> None:
    """From the newest good checkpoint, to the losses and weights of a run that nothing happened to."""
    warnings: list[str] = []
    checkpoint = latest(folder / CHECKPOINTS, warn=warnings.append)
    assert warnings == []
    again = supervise("axonn", config, folder, resume=checkpoint, timeout_s=250)
    assert again.failure is None
    assert again.losses == whole.losses
    if config.checkpoints is not None:
        weights, expected = read_weights(folder / CHECKPOINTS / last.name), read_weights(last)
        assert weights.keys() == expected.keys()
        assert all(weights[name].equal(expected[name]) for name in weights)


@pytest.mark.parametrize(
    "every", [50, pytest.param(None, marks=pytest.mark.full)], ids=["checkpoints", "metrics alone"]
)
def test_a_run_goes_on_after_the_disk_was_full(tmp_path: Path, small_disk: Path, every: int | None) -> None:
    checkpoints = None if every is None else CheckpointConfig(every=every)
    config = config_of(checkpoints=checkpoints)
    whole = supervise("axonn", config, tmp_path / "alone", timeout_s=250)
    assert whole.failure is None
    folder = small_disk / "run"
    outcome = supervise("axonn", config, folder, on_batch=FillsAfter(small_disk, 60), timeout_s=250)
    assert outcome.failure is not None
    assert outcome.failure.cause == "error"
    assert outcome.failure.rank is not None
    assert FULL in outcome.failure.detail
    assert 60 <= len(outcome.losses) < 400
    assert outcome.losses == whole.losses[: len(outcome.losses)]
    if every is not None:
        assert not list((folder / CHECKPOINTS).glob(".step-*.writing")), "what was not finished takes room"
        found = latest(folder / CHECKPOINTS)
        assert found is not None
        assert found.state.batches >= 50
    (small_disk / "filler").unlink()
    check_goes_on(folder, config, whole, last=tmp_path / "alone" / CHECKPOINTS / "step-00000400")


def test_a_disk_without_room_for_a_single_checkpoint_says_so(small_disk: Path) -> None:
    config = config_of(checkpoints=CheckpointConfig(every=30))
    outcome = supervise("axonn", config, small_disk / "run", on_batch=FillsAfter(small_disk, 1), timeout_s=250)
    assert outcome.failure is not None
    assert FULL in outcome.failure.detail
    assert latest(small_disk / "run" / CHECKPOINTS) is None


def test_training_on_a_full_disk_is_one_line(axonn: CommandLine, small_disk: Path) -> None:
    fill(small_disk)
    code, _, error = axonn("train", axonn.config(), "--out", small_disk / "run")
    assert code == 2
    assert FULL in error
    assert "Traceback" not in error


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Whoever runs it, root included: where the checkpoints are to lie is a file."""
    folder = tmp_path / "run"

    def harm(done: int) -> None:
        (folder / CHECKPOINTS).write_text("in the way")

    config = config_of(checkpoints=CheckpointConfig(every=200))
    outcome = supervise("axonn", config, folder, on_batch=harm, timeout_s=250)
    assert outcome.failure is not None
    assert outcome.failure.cause == "error"
    assert f"{folder / CHECKPOINTS}: cannot be written" in outcome.failure.detail
    assert len(outcome.losses) == 200


def test_a_state_is_told_over_the_last_one_where_there_is_no_room(small_disk: Path) -> None:
    set_state(small_disk, 0, "started")
    fill(small_disk)
    set_state(small_disk, 0, "failed", cause="error", detail="x" * 10_000)
    text = (small_disk / "rank-0.json").read_text()
    assert text.startswith('{"state": "failed"')
    assert sorted(os.listdir(small_disk)) == ["filler", "rank-0.json"]
    (small_disk / "filler").unlink()
    set_state(small_disk, 0, "failed", cause="error", detail="short")
    assert json.loads((small_disk / "rank-0.json").read_text())["detail"] == "short"
