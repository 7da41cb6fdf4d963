"""What one grid saves every other loads, whichever axes cut which parameters; each part is written and read once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from axonn.checkpoint import sharded_files
from axonn.checkpoint.checkpoints import latest, load, save, verify
from axonn.checkpoint.local_shard import LocalShard, box_elements
from axonn.checkpoint.sharded_files import read_index, stored_tensors
from axonn.distributed.runtime import connect
from axonn.errors import CheckpointError, ConfigError
from axonn.grid import ProcessGrid
from axonn.models.weights_file import export_weights, import_weights
from axonn.placement import Cut, Placement
from tests.helpers.checkpoints import PARAMETERS, masters, one_rank, parts_of, same, state_of
from tests.helpers.rank_pool import RankPool

Box = tuple[str, tuple[int, ...]]
"""A name, and where in the whole."""

GRIDS = [
    ProcessGrid(data=data, inter=inter, row=row, col=col)
    for data, inter, row, col in [
        (2, 2, 1, 1),
        (1, 4, 1, 1),
        (1, 1, 1, 1),
        (1, 3, 1, 1),
        (1, 1, 2, 2),
        (2, 1, 1, 2),
        (1, 2, 3, 1),
        (2, 2, 2, 1),
    ]
]


def save_on(comm: Any, grid: ProcessGrid, folder: Path) -> None:
    """A job of the rank pool."""
    with connect(grid, comm=comm) as runtime:
        save(folder, tensors=parts_of(grid, runtime.rank, seed=5), state=state_of(4))


def load_on(comm: Any, grid: ProcessGrid, folders: list[Path]) -> list[bool]:
    """A job of the rank pool: whether each folder gave this rank the values that it should have."""
    with connect(grid, comm=comm) as runtime:
        right = []
        for folder in folders:
            mine = parts_of(grid, runtime.rank, seed=0)
            state = load(folder / "step-00000004", mine)
            right.append(state.batches == 4 and same(mine, parts_of(grid, runtime.rank, seed=5)))
        return right


def test_what_one_grid_saves_every_other_loads(pool: RankPool, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(GRIDS))]
    for folder, grid in zip(folders, GRIDS, strict=True):
        pool.run(save_on, grid, folder, ranks=grid.size)
        assert verify(folder / "step-00000004").batches == 4
        # Whole, by one name, whoever wrote which part.
        stored = {name: tuple(tensor.shape) for name, tensor in stored_tensors(folder / "step-00000004").items()}
        assert stored == {name: part.shape for name, part in one_rank().items()}
    for grid in GRIDS:
        assert pool.run(load_on, grid, folders, ranks=grid.size) == [[True] * len(GRIDS)] * grid.size


@pytest.mark.parametrize("grid", [GRIDS[0], ProcessGrid(data=2, inter=2, row=2), ProcessGrid(row=2, col=4)], ids=str)
def test_what_replicas_share_is_written_once(pool: RankPool, tmp_path: Path, grid: ProcessGrid) -> None:
    """And of a view only the view, not the buffer that it is a part of."""
    pool.run(save_on, grid, tmp_path, ranks=grid.size)
    found = read_index(tmp_path / "step-00000004").tensors
    for name, part in one_rank().items():
        assert sum(prod(box.sizes) for box in found[name].boxes) == part.tensor.numel()
    stored = {}
    for file in (tmp_path / "step-00000004").glob("*.safetensors"):
        stored |= {(file.name, key): tensor.numel() for key, tensor in load_file(file).items()}
    assert stored == {(box.file, box.key): prod(box.sizes) for tensor in found.values() for box in tensor.boxes}


def test_damage_to_one_ranks_file_is_named(pool: RankPool, tmp_path: Path) -> None:
    grid = ProcessGrid(row=2, col=2)
    pool.run(save_on, grid, tmp_path, ranks=4)
    checkpoint = tmp_path / "step-00000004"
    (file,) = checkpoint.glob("rank-2-*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    warnings: list[str] = []
    assert latest(tmp_path, warn=warnings.append) is None
    (warning,) = warnings
    assert f"is damaged: {file.name} has another checksum" in warning
    with pytest.raises(CheckpointError, match=file.name):
        export_weights(checkpoint, tmp_path / "model.safetensors")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} cannot be read"):
        verify(checkpoint)


def test_replicas_share_the_writing(pool: RankPool, tmp_path: Path) -> None:
    pool.run(save_on, ProcessGrid(data=2, row=2, col=2), tmp_path, ranks=8)
    files = (tmp_path / "step-00000004").glob("*.safetensors")
    assert sorted(path.name for path in files) == [f"rank-{r}-0.safetensors" for r in range(8)]


def boxes_read_on(comm: Any, grid: ProcessGrid, folder: Path) -> tuple[set[Box], set[Box]]:
    """A job of the rank pool: the stored boxes that this rank reads, and those that it is made of."""
    read: set[Box] = set()
    overlaps_of = sharded_files._overlaps

    def watched(name: str, part: LocalShard, index: sharded_files.Index) -> Iterator[Any]:
        for overlap in overlaps_of(name, part, index):
            read.add((name, tuple(overlap.box.offsets)))
            yield overlap

    with connect(grid, comm=comm) as runtime, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_files, "_overlaps", watched)
        mine = parts_of(grid, runtime.rank, seed=0)
        load(folder / "step-00000004", mine)
        return read, {(n, tuple(s.start for s in piece.whole)) for n, part in mine.items() for piece in part.pieces}


def test_a_rank_reads_only_what_it_needs(pool: RankPool, tmp_path: Path) -> None:
    grid = ProcessGrid(inter=2, row=2, col=2)
    pool.run(save_on, grid, tmp_path, ranks=8)
    for read, needed in pool.run(boxes_read_on, grid, tmp_path, ranks=8):
        assert read == needed
        assert ("master.block0.scale", ()) in read or ("master.block3.scale", ()) in read


def refuse_on(comm: Any, folder: Path) -> list[str]:
    """A job of the rank pool: some ranks' model has another layer, and another shape, than the checkpoint."""
    grid = ProcessGrid(inter=2, col=2)
    messages = []
    with connect(grid, comm=comm) as runtime:
        mine = parts_of(grid, runtime.rank, seed=0)
        here = grid.coordinates(runtime.rank)
        if here.inter == 1:
            mine["master.block9.weight"] = mine.pop("master.block3.weight")
            wide = Placement(shape=(18,), cuts=(Cut(0, "col", (18,)),))
            mine["master.block2.bias"] = LocalShard.placed(torch.zeros(9), wide, grid, here)
        for act in (
            lambda: load(folder / "step-00000004", mine),
            lambda: import_weights(folder / "model.safetensors", mine),
        ):
            try:
                act()
            except ConfigError as error:
                messages.append(str(error))
    return messages


def test_a_difference_on_some_ranks_is_an_error_on_all(pool: RankPool, tmp_path: Path) -> None:
    pool.run(save_on, ProcessGrid(inter=2), tmp_path, ranks=2)
    export_weights(tmp_path / "step-00000004", tmp_path / "model.safetensors")
    for messages in pool.run(refuse_on, tmp_path, ranks=4):
        assert len(messages) == 2
        for message, source in zip(messages, ("checkpoint", "file"), strict=True):
            assert f"not in the {source}: " in message
            assert "block9.weight" in message
            assert "not in the model: " in message
            assert "block3.weight" in message
            assert f"block2.bias ([16] in the {source}, [18] in the model)" in message


def misuse_on(comm: Any, folder: Path) -> list[str]:
    """A job of the rank pool: ranks that disagree on the whole, and ranks of which one keeps its part to itself."""
    grid = ProcessGrid(row=2)
    messages = []
    with connect(grid, comm=comm) as runtime:
        mine = parts_of(grid, runtime.rank, seed=5)
        save(folder, tensors=mine, state=state_of(4))
        rank = runtime.rank
        other = mine | {"master.block1.norm": LocalShard.whole(torch.zeros(6 + rank, dtype=torch.float64))}
        short = {n: p for n, p in mine.items() if n != "master.block1.norm" or rank == 0}
        for act in (
            lambda: load(folder / "step-00000004", other),
            lambda: save(folder, tensors=short, state=state_of(5)),
        ):
            try:
                act()
            except (ConfigError, CheckpointError) as error:
                messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_parts_that_are_no_whole_are_named_on_all_ranks(pool: RankPool, tmp_path: Path) -> None:
    for other, short in pool.run(misuse_on, tmp_path, ranks=2):
        assert other.startswith("ConfigError: the ranks give whole tensors of different shapes: ")
        assert "master.block1.norm ([6] or [7])" in other
        assert short.startswith("CheckpointError: ")
        assert "cannot be written" in short
        assert "master.block1.norm" in short
    found = latest(tmp_path)
    assert found is not None
    assert found.state.batches == 4


def test_one_process_does_not_save_the_part_of_a_rank_as_if_it_were_all(tmp_path: Path) -> None:
    mine = parts_of(ProcessGrid(row=2, col=2), 3, seed=1)
    with pytest.raises(CheckpointError, match=r"exp_avg\.block0\.bias \(8 of 16 elements\), "):
        save(tmp_path, tensors={n: p for n, p in mine.items() if "block0" in n}, state=state_of(1))
    assert latest(tmp_path) is None


def import_on(comm: Any, grid: ProcessGrid, folder: Path) -> list[Any]:
    """A job of the rank pool: whether the rank has its weights, and which slices of the file it has read."""
    read: list[tuple[slice, ...]] = []

    class Watched:
        def __init__(self, stored: Any) -> None:
            self._stored = stored

        def get_shape(self) -> list[int]:
            return self._stored.get_shape()  # type: ignore[no-any-return]

        def get_dtype(self) -> str:
            return self._stored.get_dtype()  # type: ignore[no-any-return]

        def __getitem__(self, box: tuple[slice, ...]) -> torch.Tensor:
            read.append(box)
            return self._stored[box]  # type: ignore[no-any-return]

    class File:
        def __init__(self, file: Any) -> None:
            self.keys = file.keys
            self.get_slice = lambda name: Watched(file.get_slice(name))

    @contextmanager
    def opened(path: Any, framework: str) -> Iterator[File]:
        with safe_open(path, framework=framework) as file:
            yield File(file)

    with connect(grid, comm=comm) as runtime, pytest.MonkeyPatch.context() as patch:
        patch.setattr("axonn.models.weights_file.safe_open", opened)
        mine = parts_of(grid, runtime.rank, seed=2)
        import_weights(folder / "model.safetensors", mine)
        expected = parts_of(grid, runtime.rank, seed=2) | {
            n: p for n, p in parts_of(grid, runtime.rank, seed=5).items() if n.startswith("master.")
        }
        held = sum(part.tensor.numel() for name, part in mine.items() if name.startswith("master."))
        return [same(mine, expected), sum(map(box_elements, read)) == held]


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.size > 1], ids=str)
def test_every_grid_starts_from_a_file_and_reads_only_its_parts(
    pool: RankPool, tmp_path: Path, grid: ProcessGrid
) -> None:
    pool.run(save_on, ProcessGrid(row=2, col=2), tmp_path, ranks=4)
    assert export_weights(tmp_path / "step-00000004", tmp_path / "model.safetensors") == PARAMETERS
    weights = load_file(tmp_path / "model.safetensors")
    expected = masters(one_rank(seed=5))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert pool.run(import_on, grid, tmp_path, ranks=grid.size) == [[True, True]] * grid.size
