"""What one grid saves every other loads; a crash or damage costs at most the newest checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from axonn import checkpoint as ckpt
from axonn.checkpoint import Checkpoint, CheckpointState, latest, load, save, stored_tensors, verify
from axonn.errors import CheckpointError, ConfigError
from axonn.grid import ProcessGrid
from axonn.random import normal_
from axonn.runtime import connect
from axonn.weights import export_weights, import_weights
from tests.rank_pool import RankPool

Tensors = dict[str, torch.Tensor]
LAYERS = 6
GRIDS = [(2, 2), (1, 4), (4, 1), (1, 1), (1, 3)]
"""(G_data, G_inter)"""


def state_of(batches: int, **changes: Any) -> CheckpointState:
    values = {"samples": 8 * batches, "seed": 3, "progress": {"updates": batches}, "config": {}, "grid": {}} | changes
    return CheckpointState(batches=batches, **values)


def tensors_of(data: int, inter: int, rank: int, *, seed: int, dtype: torch.dtype = torch.float64) -> Tensors:
    """What an engine would hold on `rank`: its stage's layers, the tied embedding on the first and the last stage.

    Views of one flat buffer, as an optimizer's buckets are.
    """
    stage = ProcessGrid(data=data, inter=inter).coordinates(rank).inter
    shapes: dict[str, tuple[int, ...]] = {
        f"{kind}.block{i}.{name}": shape
        for i in range(LAYERS * stage // inter, LAYERS * (stage + 1) // inter)
        for name, shape in {"weight": (3, 5), "bias": (5,)}.items()
        for kind in ("master", "exp_avg", "exp_avg_sq")
    }
    if stage in (0, inter - 1):
        shapes["master.embedding.weight"] = (7, 3)
    flat = torch.zeros(sum(torch.Size(shape).numel() for shape in shapes.values()), dtype=dtype)
    parts = flat.split([torch.Size(shape).numel() for shape in shapes.values()])
    views = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
    for name, view in views.items():
        if seed:
            normal_(view, seed=seed, name=name, std=1.0)
    return views


def one_rank(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensors:
    return tensors_of(1, 1, 0, seed=seed, dtype=dtype)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


# --- grids


def save_on(comm: Any, data: int, inter: int, folder: Path) -> None:
    """A job of the rank pool."""
    with connect(ProcessGrid(data=data, inter=inter), comm=comm) as runtime:
        save(folder, tensors=tensors_of(data, inter, runtime.rank, seed=5), state=state_of(4))


def load_on(comm: Any, data: int, inter: int, folders: list[Path]) -> list[bool]:
    """A job of the rank pool: whether each folder gave this rank the values that it should have."""
    with connect(ProcessGrid(data=data, inter=inter), comm=comm) as runtime:
        right = []
        for folder in folders:
            mine = tensors_of(data, inter, runtime.rank, seed=0)
            state = load(folder / "step-00000004", mine)
            right.append(state.batches == 4 and same(mine, tensors_of(data, inter, runtime.rank, seed=5)))
        return right


def test_what_one_grid_saves_every_other_loads(pool: RankPool, tmp_path: Path) -> None:
    folders = [tmp_path / f"{data}x{inter}" for data, inter in GRIDS]
    for folder, (data, inter) in zip(folders, GRIDS, strict=True):
        pool.run(save_on, data, inter, folder, ranks=data * inter)
        assert verify(folder / "step-00000004").batches == 4
    for data, inter in GRIDS:
        assert pool.run(load_on, data, inter, folders, ranks=data * inter) == [[True] * len(GRIDS)] * (data * inter)


def test_what_replicas_share_is_written_once(pool: RankPool, tmp_path: Path) -> None:
    """And of a view only the view, not the buffer that it is a part of."""

    def bytes_of(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.glob("step-00000004/*.distcp"))

    save(tmp_path / "one", tensors=one_rank(seed=5), state=state_of(4))
    pool.run(save_on, 4, 2, tmp_path / "eight", ranks=8)
    assert bytes_of(tmp_path / "eight") < 1.1 * bytes_of(tmp_path / "one")


def refuse_on(comm: Any, folder: Path) -> list[str]:
    """A job of the rank pool: the second stage's model has another layer than the checkpoint."""
    messages = []
    with connect(ProcessGrid(inter=2), comm=comm) as runtime:
        mine = tensors_of(1, 2, runtime.rank, seed=0)
        if runtime.rank == 1:
            mine["master.block9.weight"] = mine.pop("master.block5.weight")
            mine["master.block4.bias"] = torch.zeros(6)
        for act in (
            lambda: load(folder / "step-00000004", mine),
            lambda: import_weights(folder / "model.safetensors", mine),
        ):
            try:
                act()
            except ConfigError as error:
                messages.append(str(error))
    return messages


def test_a_difference_on_one_rank_is_an_error_on_all(pool: RankPool, tmp_path: Path) -> None:
    pool.run(save_on, 1, 2, tmp_path, ranks=2)
    export_weights(tmp_path / "step-00000004", tmp_path / "model.safetensors")
    for messages in pool.run(refuse_on, tmp_path, ranks=2):
        assert len(messages) == 2
        for message, source in zip(messages, ("checkpoint", "file"), strict=True):
            assert f"not in the {source}: " in message
            assert "block9.weight" in message
            assert "not in the model: " in message
            assert "block5.weight" in message
            assert f"block4.bias ([5] in the {source}, [6] in the model)" in message


def cut_tensors(comm: Any, act: str, folder: Path, placement: Any) -> torch.Tensor:
    """A job of the rank pool: one tensor cut over all ranks."""
    with connect(ProcessGrid(data=comm.Get_size()), comm=comm):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        whole = torch.arange(56.0).view(8, 7)
        mine = distribute_tensor(whole if act == "save" else torch.zeros(8, 7), mesh, [placement])
        if act == "save":
            save(folder, tensors={"master.w": mine}, state=state_of(1))
        elif act == "load":
            load(folder / "step-00000001", {"master.w": mine})
        else:
            import_weights(folder / "model.safetensors", {"master.w": mine})
        assert isinstance(mine, DTensor)
        return mine.full_tensor()


def test_tensors_cut_over_ranks_pass_through(pool: RankPool, tmp_path: Path) -> None:
    whole = torch.arange(56.0).view(8, 7)
    pool.run(cut_tensors, "save", tmp_path, Shard(0), ranks=2)
    alone = {"master.w": torch.zeros(8, 7)}
    load(tmp_path / "step-00000001", alone)
    assert torch.equal(alone["master.w"], whole)
    assert export_weights(tmp_path / "step-00000001", tmp_path / "model.safetensors") == 56
    for act, placement in (("load", Shard(1)), ("load", Replicate()), ("import", Shard(1))):
        assert torch.equal(pool.run(cut_tensors, act, tmp_path, placement, ranks=4)[0], whole)


# --- one rank


@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_another_precision_is_converted(tmp_path: Path, target: torch.dtype) -> None:
    path = save(tmp_path, tensors=one_rank(), state=state_of(1))
    mine = one_rank(seed=0, dtype=target)
    load(path, mine)
    assert same(mine, {name: value.to(target) for name, value in one_rank().items()})


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
    places = {name: tensor.data_ptr() for name, tensor in mine.items()}
    load(path, mine)
    assert {name: tensor.data_ptr() for name, tensor in mine.items()} == places


@settings(max_examples=20)
@given(st.lists(st.integers(1, 300), unique=True, min_size=1, max_size=6), st.integers(1, 4))
def test_the_newest_are_kept(tmp_path_factory: pytest.TempPathFactory, batches: list[int], keep: int) -> None:
    folder = tmp_path_factory.mktemp("run")
    for number in sorted(batches):
        save(folder, tensors={"w": torch.ones(2)}, state=state_of(number), keep=keep)
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


STEPS_OF_A_SAVE = ["_write", "_files_of", "write_durably", "sync_folder", "_prune", "_remove"]


@pytest.mark.parametrize("point", STEPS_OF_A_SAVE)
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_step_of_a_save_keeps_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, after: bool
) -> None:
    save(tmp_path, tensors=one_rank(seed=1), state=state_of(1), keep=1)
    real: Callable[..., Any] = getattr(ckpt, point)

    def crash(*arguments: Any, **options: Any) -> None:
        if after:
            real(*arguments, **options)
        raise Crash

    monkeypatch.setattr(ckpt, point, crash)
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
    mine["master.block0.weight"] = torch.zeros(5, 3)
    for number in range(7):
        mine[f"master.more{number}.weight"] = torch.zeros(1)
    del mine["exp_avg.block1.bias"]
    with pytest.raises(ConfigError) as raised:
        load(path, mine)
    message = str(raised.value)
    assert "not in the checkpoint: master.more0.weight, " in message
    assert "master.more4.weight and 2 more; " in message
    assert "not in the model: exp_avg.block1.bias; " in message
    assert "master.block0.weight ([3, 5] in the checkpoint, [5, 3] in the model)" in message
    assert not any(tensor.any() for tensor in mine.values()), "something was loaded all the same"


# --- one file of weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_go_out_and_in(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save(tmp_path, tensors=one_rank(dtype=dtype), state=state_of(1))
    out = tmp_path / "model.safetensors"
    assert export_weights(path, out) == LAYERS * 20 + 21
    masters = {n.removeprefix("master."): t for n, t in one_rank(dtype=dtype).items() if n.startswith("master.")}
    assert same(load_file(out), masters)
    mine = one_rank(seed=2)
    import_weights(out, mine)
    expected = {n: one_rank(dtype=dtype)[n].double() if n.startswith("master.") else t for n, t in one_rank(2).items()}
    assert same(mine, expected)


def test_weights_of_half_precision_are_converted(tmp_path: Path) -> None:
    masters = {n.removeprefix("master."): t.half() for n, t in one_rank().items() if n.startswith("master.")}
    save_file(masters, tmp_path / "model.safetensors")
    mine = one_rank(seed=0)
    import_weights(tmp_path / "model.safetensors", mine)
    assert torch.equal(mine["master.block3.weight"], one_rank()["master.block3.weight"].half().double())


def test_unusable_weights_are_refused(tmp_path: Path) -> None:
    masters = {n.removeprefix("master."): t.clone() for n, t in one_rank().items() if n.startswith("master.")}
    masters["extra"] = torch.ones(1)
    del masters["block1.bias"]
    masters["block2.bias"] = torch.ones(6)
    save_file(masters, tmp_path / "other.safetensors")
    mine = one_rank()
    with pytest.raises(ConfigError) as raised:
        import_weights(tmp_path / "other.safetensors", mine)
    assert "not in the file: block1.bias; not in the model: extra; " in str(raised.value)
    assert "block2.bias ([6] in the file, [5] in the model)" in str(raised.value)
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
        name: (t.shape, t.dtype) for name, t in one_rank().items()
    }
    assert all(t.is_meta for t in stored.values())
