"""A crash or damage costs at most the newest checkpoint; what is wrong is named; weights go out and in."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from axonn import checkpoint as ckpt
from axonn import part_files
from axonn.checkpoint import Checkpoint, latest, load, read_state, save, stored_tensors, verify
from axonn.errors import CheckpointError, ConfigError
from axonn.grid import ProcessGrid
from axonn.weights import export_weights, import_weights
from tests.checkpoints import PARAMETERS, masters, one_rank, parts_of, same, state_of
from tests.parts import wholes


def damaged(path: Path, how: str) -> None:
    """Harm a checkpoint in one of the ways in which a crash or a disk does."""
    (data,) = path.glob("*.distcp")
    content = data.read_bytes()
    if how == "truncated":
        data.write_bytes(content[: len(content) // 2])
    elif how == "one bit":
        middle = len(content) // 2
        data.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "no data":
        data.unlink()
    elif how == "no metadata":
        (path / ".metadata").unlink()
    elif how == "no state":
        (path / "state.json").unlink()
    elif how == "half a state":
        text = (path / "state.json").read_text()
        (path / "state.json").write_text(text[: len(text) // 2])
    elif how == "empty":
        for file in path.iterdir():
            file.unlink()


DAMAGE = ["truncated", "one bit", "no data", "no metadata", "no state", "half a state", "empty"]


# --- one rank


@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_another_precision_is_converted(tmp_path: Path, target: torch.dtype) -> None:
    path = save(tmp_path, tensors=one_rank(), state=state_of(1))
    mine = one_rank(seed=0, dtype=target)
    load(path, mine)
    assert same(mine, wholes({name: part.tensor.to(target) for name, part in one_rank().items()}))


def test_the_state_comes_back(tmp_path: Path) -> None:
    state = state_of(7, progress={"loss_scale": 65536.0, "updates": 6}, config={"model": {"layers": 2}}, seed=11)
    read = load(save(tmp_path, tensors=one_rank(), state=state), one_rank())
    assert (read.batches, read.samples, read.seed) == (7, 56, 11)
    assert (read.progress, read.config) == (state.progress, state.config)
    assert read.versions["torch"] == torch.__version__
    assert json.loads((tmp_path / "step-00000007" / "state.json").read_text())["schema"] == "axonn-checkpoint/1"


def test_a_checkpoint_may_be_moved(tmp_path: Path) -> None:
    save(tmp_path / "here", tensors=one_rank(), state=state_of(1))
    (tmp_path / "here").rename(tmp_path / "there")
    mine = one_rank(seed=0)
    load(tmp_path / "there" / "step-00000001", mine)
    assert same(mine, one_rank())


def test_loading_keeps_the_memory_of_the_tensors(tmp_path: Path) -> None:
    path = save(tmp_path, tensors=one_rank(), state=state_of(1))
    mine = one_rank(seed=0)
    places = {name: part.tensor.data_ptr() for name, part in mine.items()}
    load(path, mine)
    assert {name: part.tensor.data_ptr() for name, part in mine.items()} == places


@settings(max_examples=20)
@given(st.lists(st.integers(1, 300), unique=True, min_size=1, max_size=6), st.integers(1, 4))
def test_the_newest_are_kept(tmp_path_factory: pytest.TempPathFactory, batches: list[int], keep: int) -> None:
    folder = tmp_path_factory.mktemp("run")
    for number in sorted(batches):
        save(folder, tensors=wholes({"w": torch.ones(2)}), state=state_of(number), keep=keep)
    assert sorted(os.listdir(folder)) == [f"step-{n:08d}" for n in sorted(batches)[-keep:]]
    newest = latest(folder)
    assert newest is not None
    assert newest.state.batches == max(batches)


def test_there_may_be_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "none") is None
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    assert latest(tmp_path) is None
    ckpt.remove_all(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-00000009", "step-notes"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, how: str) -> None:
    for number in (1, 2, 3):
        save(tmp_path, tensors=one_rank(seed=number), state=state_of(number))
    damaged(tmp_path / "step-00000003", how)
    warnings: list[str] = []
    found = latest(tmp_path, warn=warnings.append)
    assert found is not None
    assert found.state.batches == 2
    (warning,) = warnings
    assert "step-00000003: is" in warning
    assert warning.endswith("it is skipped")
    with pytest.raises(CheckpointError, match="step-00000003: is"):
        verify(tmp_path / "step-00000003")


def test_a_damaged_checkpoint_does_not_cost_good_ones_and_is_replaced(tmp_path: Path) -> None:
    for number in (1, 2, 5):
        save(tmp_path, tensors=one_rank(seed=number), state=state_of(number))
    damaged(tmp_path / "step-00000005", "truncated")
    for number in (3, 4):
        save(tmp_path, tensors=one_rank(seed=number), state=state_of(number), keep=1)
        assert sorted(os.listdir(tmp_path)) == [f"step-0000000{number}", "step-00000005"]
    save(tmp_path, tensors=one_rank(seed=6), state=state_of(5), keep=1)
    assert os.listdir(tmp_path) == ["step-00000005"]
    mine = one_rank(seed=0)
    load(tmp_path / "step-00000005", mine)
    assert same(mine, one_rank(seed=6))


class Crash(BaseException):
    pass


STEPS_OF_A_SAVE = ["write_parts", "_files_of", "write_durably", "sync_folder", "_prune", "_remove"]


@pytest.mark.parametrize("point", STEPS_OF_A_SAVE)
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_step_of_a_save_keeps_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, after: bool
) -> None:
    save(tmp_path, tensors=one_rank(seed=1), state=state_of(1), keep=1)
    module = part_files if point == "write_parts" else ckpt
    real: Callable[..., Any] = getattr(module, point)

    def crash(*arguments: Any, **options: Any) -> None:
        if after:
            real(*arguments, **options)
        raise Crash

    monkeypatch.setattr(module, point, crash)
    with pytest.raises(Crash):
        save(tmp_path, tensors=one_rank(seed=2), state=state_of(2), keep=1)
    monkeypatch.undo()
    warnings: list[str] = []
    found = latest(tmp_path, warn=warnings.append)
    assert found is not None
    assert warnings == []
    mine = one_rank(seed=0)
    load(found.folder, mine)
    assert same(mine, one_rank(seed=found.state.batches))
    ckpt.clean(tmp_path)
    assert all(name.startswith("step-") for name in os.listdir(tmp_path))
    save(tmp_path, tensors=one_rank(seed=2), state=state_of(2), keep=1)
    assert os.listdir(tmp_path) == ["step-00000002"]


def test_a_crash_while_a_checkpoint_is_removed_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        save(tmp_path, tensors=one_rank(), state=state_of(number))

    def crash(path: Path) -> None:
        raise Crash

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(Crash):
        save(tmp_path, tensors=one_rank(), state=state_of(3), keep=1)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    ckpt.clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000003"]


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: cannot be written: .*Not a directory"):
        save(tmp_path / "file", tensors=one_rank(), state=state_of(1))


def test_a_full_disk_says_so_and_keeps_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, tensors=one_rank(), state=state_of(1))

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt, "write_durably", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device"):
        save(tmp_path, tensors=one_rank(), state=state_of(2))
    found = latest(tmp_path)
    assert isinstance(found, Checkpoint)
    assert found.state.batches == 1


@pytest.mark.parametrize("schema", ["axonn-checkpoint/2", "axonn-checkpoint/17"])
def test_a_newer_schema_is_refused_and_not_skipped(tmp_path: Path, schema: str) -> None:
    save(tmp_path, tensors=one_rank(), state=state_of(1))
    path = save(tmp_path, tensors=one_rank(), state=state_of(2))
    text = (path / "state.json").read_text().replace("axonn-checkpoint/1", schema)
    (path / "state.json").write_text(text)
    for act in (latest, lambda folder: load(path, one_rank())):
        with pytest.raises(ConfigError, match=f"step-00000002: has schema '{schema}'"):
            act(tmp_path)


def test_another_model_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, tensors=one_rank(), state=state_of(1))
    mine = one_rank(seed=0)
    more = {"master.block0.weight": torch.zeros(6, 16)} | {f"master.more{n}.weight": torch.zeros(1) for n in range(7)}
    mine |= wholes(more)
    del mine["exp_avg.block1.bias"]
    with pytest.raises(ConfigError) as raised:
        load(path, mine)
    message = str(raised.value)
    assert "not in the checkpoint: master.more0.weight, " in message
    assert "master.more4.weight and 2 more; " in message
    assert "not in the model: exp_avg.block1.bias; " in message
    assert "master.block0.weight ([16, 6] in the checkpoint, [6, 16] in the model)" in message
    assert not any(part.tensor.any() for part in mine.values()), "something was loaded all the same"


def test_a_checkpoint_from_before_there_were_parts_is_read(tmp_path: Path) -> None:
    """As it was written then, plain tensors by the planner of torch alone; the schema is the same."""
    path = save(tmp_path, tensors=wholes({"w": torch.ones(2)}), state=state_of(1))
    for file in [*path.glob("*.distcp"), path / ".metadata"]:
        file.unlink()
    plain = {name: part.tensor for name, part in one_rank().items()}
    with pytest.warns(UserWarning, match="in a single process"):
        save_state_dict(plain, storage_writer=FileSystemWriter(path), no_dist=True)
    assert read_state(path).batches == 1
    mine = one_rank(seed=0)
    load(path, mine)
    assert same(mine, one_rank())
    grid = ProcessGrid(row=2, col=2)
    part = parts_of(grid, 3, seed=0)
    load(path, part)
    assert same(part, parts_of(grid, 3, seed=1))


def test_what_a_checkpoint_lacks_of_a_tensor_is_named(tmp_path: Path) -> None:
    """Not left at what happened to be there."""
    path = save(tmp_path, tensors=one_rank(), state=state_of(1))
    metadata = FileSystemReader(path).read_metadata()
    entry = metadata.state_dict_metadata["exp_avg.block2.bias"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.chunks = [ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([15]))]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    mine = one_rank(seed=0)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*not all of it is stored: exp_avg\.block2\.bias$"):
        load(path, mine)
    assert not any(part.tensor.any() for part in mine.values())


# --- one file of weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_go_out_and_in(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save(tmp_path, tensors=one_rank(dtype=dtype), state=state_of(1))
    out = tmp_path / "model.safetensors"
    assert export_weights(path, out) == PARAMETERS
    assert same(wholes(load_file(out)), wholes(masters(one_rank(dtype=dtype))))
    mine = one_rank(seed=2)
    import_weights(out, mine)
    new = {n: p.tensor.double() for n, p in one_rank(dtype=dtype).items() if n.startswith("master.")}
    assert same(mine, one_rank(seed=2) | wholes(new))


def test_weights_of_half_precision_are_converted(tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in masters(one_rank()).items()}
    save_file(halves, tmp_path / "model.safetensors")
    mine = one_rank(seed=0)
    import_weights(tmp_path / "model.safetensors", mine)
    assert torch.equal(mine["master.block3.weight"].tensor, halves["block3.weight"].double())


def test_unusable_weights_are_refused(tmp_path: Path) -> None:
    weights = masters(one_rank())
    weights["extra"] = torch.ones(1)
    del weights["block1.bias"]
    weights["block2.bias"] = torch.ones(6)
    save_file(weights, tmp_path / "other.safetensors")
    mine = one_rank()
    with pytest.raises(ConfigError) as raised:
        import_weights(tmp_path / "other.safetensors", mine)
    assert "not in the file: block1.bias; not in the model: extra; " in str(raised.value)
    assert "block2.bias ([6] in the file, [16] in the model)" in str(raised.value)
    (tmp_path / "text").write_text("no weights")
    for name in ("text", "none"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read as safetensors"):
            import_weights(tmp_path / name, mine)
    assert same(mine, one_rank())


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    path = save(tmp_path, tensors=one_rank(), state=state_of(1))
    damaged(path, "one bit")
    with pytest.raises(CheckpointError, match="is damaged"):
        export_weights(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_shapes_are_read_without_values(tmp_path: Path) -> None:
    stored = stored_tensors(save(tmp_path, tensors=one_rank(), state=state_of(1)))
    assert {name: (t.shape, t.dtype) for name, t in stored.items()} == {
        name: (p.tensor.shape, p.tensor.dtype) for name, p in one_rank().items()
    }
    assert all(t.is_meta for t in stored.values())
