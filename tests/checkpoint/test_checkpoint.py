"""A crash or damage costs at most the newest checkpoint; what is wrong is named; weights go out and in."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from axonn.checkpoint import checkpoints as ckpt
from axonn.checkpoint import sharded_files
from axonn.checkpoint.checkpoints import Checkpoint, latest, load, read_state, save, verify
from axonn.checkpoint.sharded_files import stored_tensors
from axonn.errors import CheckpointError, ConfigError
from axonn.models.weights_file import export_weights, import_weights
from tests.helpers.checkpoints import PARAMETERS, masters, one_rank, same, state_of
from tests.helpers.shard_cases import wholes


def damaged(path: Path, how: str) -> None:
    """Harm a checkpoint in one of the ways in which a crash or a disk does."""
    (data,) = path.glob("*.safetensors")
    content = data.read_bytes()
    if how == "truncated":
        data.write_bytes(content[: len(content) // 2])
    elif how == "one bit":
        middle = len(content) // 2
        data.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "no data":
        data.unlink()
    elif how == "no index":
        (path / "index.json").unlink()
    elif how == "no state":
        (path / "state.json").unlink()
    elif how == "half a state":
        text = (path / "state.json").read_text()
        (path / "state.json").write_text(text[: len(text) // 2])
    elif how == "empty":
        for file in path.iterdir():
            file.unlink()


DAMAGE = ["truncated", "one bit", "no data", "no index", "no state", "half a state", "empty"]


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
    assert json.loads((tmp_path / "step-00000007" / "state.json").read_text())["schema"] == "axonn-checkpoint/2"


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


STEPS_OF_A_SAVE = ["write_shards", "_describe_all", "write_durably", "sync", "_prune", "_remove"]


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


@pytest.mark.parametrize(
    ("schema", "do"),
    [
        ("axonn-checkpoint/1", "go on with the version that wrote it, or start anew with --fresh"),
        ("axonn-checkpoint/17", "use a newer version"),
    ],
)
def test_another_schema_is_refused_and_not_skipped(tmp_path: Path, schema: str, do: str) -> None:
    save(tmp_path, tensors=one_rank(), state=state_of(1))
    path = save(tmp_path, tensors=one_rank(), state=state_of(2))
    text = (path / "state.json").read_text().replace(ckpt.SCHEMA, schema)
    (path / "state.json").write_text(text)
    for act in (latest, lambda folder: load(path, one_rank())):
        with pytest.raises(ConfigError, match=f"step-00000002: has schema '{schema}', .*; {do}$"):
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


def with_index(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change `index.json` as a stranger may have, checksum and all."""
    index = json.loads((path / "index.json").read_text())
    change(index["tensors"])
    (path / "index.json").write_text(json.dumps(index))
    content = (path / "index.json").read_bytes()
    state = json.loads((path / "state.json").read_text())
    state["files"]["index.json"] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (path / "state.json").write_text(json.dumps(state))
    verify(path)


def test_what_a_checkpoint_lacks_of_a_tensor_is_named(tmp_path: Path) -> None:
    """Not left at what happened to be there."""
    path = save(tmp_path, tensors=one_rank(), state=state_of(1))
    with_index(path, lambda tensors: tensors["exp_avg.block2.bias"]["boxes"][0].update(sizes=[15]))
    mine = one_rank(seed=0)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*not all of it is stored: exp_avg\.block2\.bias$"):
        load(path, mine)
    assert not any(part.tensor.any() for part in mine.values())


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "outside": (lambda box: box.update(file="../../secret.safetensors"), "'tensors.master.block0.weight.boxes.0.file'"),
    "absolute": (lambda box: box.update(file="/etc/passwd"), "'tensors.master.block0.weight.boxes.0.file'"),
    "huge": (lambda box: box.update(sizes=[1 << 40, 1 << 40]), "does not fit into rank-0-0.safetensors"),
    "negative": (lambda box: box.update(sizes=[-16, 6]), "'tensors.master.block0.weight.boxes.0.sizes.0'"),
    "dims": (lambda box: box.update(sizes=[96], offsets=[0]), "does not fit into rank-0-0.safetensors"),
    "key": (lambda box: box.update(key="nothing"), "nothing"),
    "another's": (lambda box: box.update(key="master.block0.scale[]"), "has another shape than index.json says"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_index_that_lies_is_found(tmp_path: Path, what: str) -> None:
    change, message = HOSTILE[what]
    path = save(tmp_path, tensors=one_rank(), state=state_of(1))
    with_index(path, lambda tensors: change(tensors["master.block0.weight"]["boxes"][0]))
    with pytest.raises(CheckpointError) as raised:
        load(path, one_rank(seed=0))
    assert message in str(raised.value)


def test_a_type_that_nobody_knows_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, tensors=one_rank(), state=state_of(1))
    with_index(path, lambda tensors: tensors["master.block0.bias"].update(dtype="load"))
    with pytest.raises(CheckpointError, match=r"master\.block0\.bias is of the unknown type 'load'"):
        load(path, one_rank(seed=0))


@pytest.mark.parametrize("name", ["state.json", "index.json", "rank-0-0.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_only_files_of_the_checkpoint_itself_are_read(tmp_path: Path, name: str, kind: str) -> None:
    """A pipe would keep the reader waiting for ever."""
    path = save(tmp_path / "run", tensors=one_rank(), state=state_of(1))
    (path / name).rename(tmp_path / name)
    if kind == "link":
        (path / name).symlink_to(tmp_path / name)
    else:
        os.mkfifo(path / name)
    for act in (verify, lambda folder: load(folder, one_rank(seed=0))):
        with pytest.raises(CheckpointError, match=r"step-00000001: .*not a regular file"):
            act(path)


def test_a_checksum_of_a_file_elsewhere_is_not_computed(tmp_path: Path) -> None:
    path = save(tmp_path, tensors=one_rank(), state=state_of(1))
    for name in ("/dev/zero", "../state.json", ".."):
        state = json.loads((path / "state.json").read_text())
        state["files"][name] = {"bytes": 1, "crc32": 1}
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "state.json").write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match=r"other: is damaged: state.json: 'files\."):
            verify(tmp_path / "other")


def test_large_states_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_files, "SHARD_BYTES", 2000)
    path = save(tmp_path, tensors=one_rank(), state=state_of(1))
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert len(sizes) >= 4
    assert sorted(read_state(path).files) == sorted(file.name for file in path.iterdir() if file.name != "state.json")
    mine = one_rank(seed=0)
    load(path, mine)
    assert same(mine, one_rank())


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
