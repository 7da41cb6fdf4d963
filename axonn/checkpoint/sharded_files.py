"""Sharded tensors in safetensors files, stored by global name and independent of the grid.

The unit of storage is a box: each piece of a rank's shard is one. A box that several ranks hold is written by one of
them, and a rank reads the boxes that overlap its own. `index.json` says which box lies in which file. No file is
executable: reading untrusted files runs no code of their author.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from axonn.checkpoint.local_shard import LocalShard, some_names
from axonn.checkpoint.rank_group import RankGroup
from axonn.config.train_config import StrictModel
from axonn.durable_files import reason_of, regular_file, sync, write_durably
from axonn.errors import CheckpointError
from axonn.placement import ParameterBox, Shape

Shards = Mapping[str, LocalShard]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
"""Name of a file in the folder of the checkpoint, without a path."""
Extent = Annotated[int, Field(ge=0)]
INDEX = "index.json"
SHARD_BYTES = 512 << 20
"""Approximate size of one file. A rank writes its files one after the other, and copies only one at a time."""
_TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


class StoredBox(StrictModel):
    """A box of a tensor: `sizes` elements from `offsets` on, under `key` in `file`."""

    file: FileName
    key: str
    offsets: list[Extent]
    sizes: list[Extent]


class StoredTensor(StrictModel):
    """A full tensor, and the boxes that it consists of."""

    dtype: str
    shape: list[Extent]
    boxes: list[StoredBox]


class Index(StrictModel):
    """Content of `index.json`."""

    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class _Box:
    """One box of the tensor called `name`: `sizes` elements from `offsets` on."""

    name: str
    offsets: Shape
    sizes: Shape

    @property
    def key(self) -> str:
        return f"{self.name}[{','.join(f'{o}:{o + n}' for o, n in zip(self.offsets, self.sizes, strict=True))}]"


def write_shards(folder: Path, shards: Shards, ranks: RankGroup) -> list[str]:
    """Write the shards of all ranks into `folder` and return the names of the files that this rank wrote.

    Collective. Raises `CheckpointError` on all ranks, naming the ranks that could not write, or the incomplete tensors.
    """
    held = ranks.gather(_description(shards))
    writers = _writers(held)
    _check_complete(held, writers, folder)
    views = {_box(name, piece): shard.view(piece) for name, shard in shards.items() for piece in shard.pieces}
    files = {box: name for rank in range(ranks.size) for name, box in _files(rank, held, writers)}
    written: list[str] = []

    def write() -> None:
        assigned = list(_files(ranks.rank, held, writers))
        for name in dict.fromkeys(name for name, _ in assigned):
            # Copies, because the tensors may be strided or share their memory with others.
            values = {
                box.key: torch.empty(box.sizes, dtype=views[box].dtype).copy_(views[box].detach())
                for file, box in assigned
                if file == name
            }
            save_file(values, folder / name)
            sync(folder / name)
            written.append(name)
        if ranks.rank == 0:
            write_durably(folder / INDEX, _index(held, files).model_dump_json(indent=0) + "\n")
            written.append(INDEX)

    _on_every_rank(write, f"{folder}: cannot be written", ranks)
    return written


def read_shards(folder: Path | str, shards: Shards, ranks: RankGroup | None) -> None:
    """Fill `shards`, converting to their types. Collective over `ranks`; None: this process alone.

    Names and global shapes must be those that are stored. Raises `CheckpointError`, on all ranks.
    """
    folder = Path(folder)

    def read() -> None:
        index = read_index(folder)
        overlaps = [overlap for name, shard in shards.items() for overlap in _overlaps(name, shard, index)]
        stored_elements = {name: 0 for name in shards}
        for overlap in overlaps:
            stored_elements[overlap.name] += overlap.elements
        if incomplete := [n for n, shard in shards.items() if stored_elements[n] != shard.tensor.numel()]:
            raise CheckpointError(f"not all of it is stored: {some_names(incomplete)}")
        with ExitStack() as opened, torch.no_grad():
            files: dict[str, Any] = {}
            for overlap in overlaps:
                name = overlap.box.file
                if name not in files:
                    files[name] = opened.enter_context(safe_open(folder / name, framework="pt"))
                stored = files[name].get_slice(overlap.box.key)
                if list(stored.get_shape()) != overlap.box.sizes:
                    raise CheckpointError(f"{name}: {overlap.box.key} has another shape than {INDEX} says")
                overlap.target.copy_(stored[overlap.inside])

    _on_every_rank(read, f"{folder}: cannot be read", ranks)


def stored_tensors(folder: Path | str) -> dict[str, torch.Tensor]:
    """Return the full tensors by name, without their values (device "meta"). Raises `CheckpointError`."""
    return {
        name: torch.empty(stored.shape, dtype=_TYPES[stored.dtype], device="meta")
        for name, stored in read_index(Path(folder)).tensors.items()
    }


def read_index(folder: Path) -> Index:
    """Read the index of `folder`. Raises `CheckpointError`, also when it lists more elements than its files hold."""
    path = folder / INDEX
    try:
        index = Index.model_validate(json.loads(regular_file(path).read_text(encoding="utf-8")))
        names = {box.file for stored in index.tensors.values() for box in stored.boxes}
        room = {name: regular_file(folder / name).stat().st_size for name in names}
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{folder}: is damaged: {INDEX}: '{place}': {first['msg']}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {reason_of(error)}") from error
    for name, stored in index.tensors.items():
        if stored.dtype not in _TYPES:
            raise CheckpointError(f"{folder}: is damaged: {INDEX}: {name} is of the unknown type '{stored.dtype}'")
        for box in stored.boxes:
            room[box.file] -= prod(box.sizes) * _TYPES[stored.dtype].itemsize
            if not len(box.offsets) == len(box.sizes) == len(stored.shape) or room[box.file] < 0:
                raise CheckpointError(f"{folder}: is damaged: {INDEX}: {name} does not fit into {box.file}")
    return index


# --- assignment of boxes to ranks: every rank computes the same


_Description = Mapping[str, tuple[str, Shape, Sequence[_Box]]]
"""Shards of one rank: type, global shape and boxes by name."""


def _description(shards: Shards) -> _Description:
    return {
        name: (
            str(shard.tensor.dtype).removeprefix("torch."),
            shard.shape,
            [_box(name, piece) for piece in shard.pieces],
        )
        for name, shard in shards.items()
    }


def _box(name: str, piece: ParameterBox) -> _Box:
    return _Box(name, tuple(s.start for s in piece.whole), tuple(s.stop - s.start for s in piece.whole))


def _bytes(box: _Box, dtype: str) -> int:
    return prod(box.sizes) * _TYPES[dtype].itemsize


def _writers(held: Sequence[_Description]) -> dict[_Box, int]:
    """Assign each box to the rank, among those that hold it, with the least to write so far."""
    holders: dict[_Box, list[int]] = {}
    sizes: dict[_Box, int] = {}
    for rank, description in enumerate(held):
        for dtype, _, boxes in description.values():
            for box in boxes:
                holders.setdefault(box, []).append(rank)
                sizes[box] = _bytes(box, dtype)
    load = [0] * len(held)
    writers = {}
    # Boxes that a single rank holds leave no choice, so they are assigned first.
    for box in sorted(holders, key=lambda box: (len(holders[box]), box.name, box.offsets)):
        writer = min(holders[box], key=lambda rank: (load[rank], rank))
        load[writer] += sizes[box]
        writers[box] = writer
    return writers


def _files(rank: int, held: Sequence[_Description], writers: Mapping[_Box, int]) -> Iterator[tuple[str, _Box]]:
    """Yield the boxes that `rank` writes, each with the name of its file."""
    number = filled = 0
    for dtype, _, boxes in held[rank].values():
        for box in boxes:
            if writers[box] != rank:
                continue
            size = _bytes(box, dtype)
            if filled and filled + size > SHARD_BYTES:
                number, filled = number + 1, 0
            filled += size
            yield f"rank-{rank}-{number}.safetensors", box


def _check_complete(held: Sequence[_Description], writers: Mapping[_Box, int], folder: Path) -> None:
    shapes = {name: shape for description in held for name, (_, shape, _) in description.items()}
    elements = dict.fromkeys(shapes, 0)
    for box in writers:
        elements[box.name] += prod(box.sizes)
    incomplete = [
        f"{name} ({elements[name]} of {prod(shape)} elements)"
        for name, shape in shapes.items()
        if elements[name] != prod(shape)
    ]
    if incomplete:
        raise CheckpointError(
            f"{folder}: cannot be written: not all of it is on the ranks that save: {some_names(incomplete)}"
        )


def _index(held: Sequence[_Description], files: Mapping[_Box, str]) -> Index:
    tensors: dict[str, StoredTensor] = {}
    for description in held:
        for name, (dtype, shape, _) in description.items():
            tensors.setdefault(name, StoredTensor(dtype=dtype, shape=list(shape), boxes=[]))
    for box, file in files.items():
        stored = StoredBox(file=file, key=box.key, offsets=list(box.offsets), sizes=list(box.sizes))
        tensors[box.name].boxes.append(stored)
    return Index(tensors=tensors)


# --- boxes that a rank reads


@dataclass(frozen=True)
class _Overlap:
    """The intersection of a stored box and one piece of a rank's shard."""

    name: str
    box: StoredBox
    inside: tuple[slice, ...]
    """Position in the box."""
    target: torch.Tensor
    """View of the shard."""

    @property
    def elements(self) -> int:
        return prod(along.stop - along.start for along in self.inside)


def _overlaps(name: str, shard: LocalShard, index: Index) -> Iterator[_Overlap]:
    stored = index.tensors.get(name)
    if stored is None or tuple(stored.shape) != shard.shape:
        return
    for piece in shard.pieces:
        view = shard.view(piece)
        for box in stored.boxes:
            in_box, in_piece = [], []
            for wanted, offset, size in zip(piece.whole, box.offsets, box.sizes, strict=True):
                start, stop = max(wanted.start, offset), min(wanted.stop, offset + size)
                in_box.append(slice(start - offset, stop - offset))
                in_piece.append(slice(start - wanted.start, stop - wanted.start))
            if all(along.start < along.stop for along in in_box):
                yield _Overlap(name, box, tuple(in_box), view[tuple(in_piece)])


def _on_every_rank(act: Callable[[], None], failure: str, ranks: RankGroup | None) -> None:
    """Run `act` on every rank. A failure on any raises `CheckpointError` on all: `failure`, then reasons by rank."""
    problem: Exception | None = None
    try:
        act()
    except (OSError, SafetensorError, CheckpointError) as error:
        problem = error
    problems = [None if problem is None else str(problem)]
    if ranks is not None:
        problems = ranks.gather(problems[0])
    reasons = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None)
    if reasons:
        raise CheckpointError(f"{failure}: {reasons}") from problem
