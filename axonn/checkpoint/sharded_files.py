"""Parts of tensors in safetensors files, whole by name there, whoever holds what.

What is stored is boxes: each of a rank's pieces is one, a piece that several ranks hold is written by one of them, and
a rank reads the boxes that overlap its own. `index.json` says which box lies in which file. Nothing here is a program:
reading the files of a stranger runs nothing of theirs.
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

Parts = Mapping[str, LocalShard]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
"""Of a file in the checkpoint's own folder."""
Extent = Annotated[int, Field(ge=0)]
INDEX = "index.json"
SHARD_BYTES = 512 << 20
"""A rank writes files of about this size, one after the other: so much of its state is in memory twice."""
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
    """A whole tensor, and the boxes that it consists of."""

    dtype: str
    shape: list[Extent]
    boxes: list[StoredBox]


class Index(StrictModel):
    """What `index.json` holds."""

    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class _Box:
    """One of a tensor's boxes, with the place of its values in the rank that asks."""

    name: str
    offsets: Shape
    sizes: Shape

    @property
    def key(self) -> str:
        return f"{self.name}[{','.join(f'{o}:{o + n}' for o, n in zip(self.offsets, self.sizes, strict=True))}]"


def write_parts(folder: Path, parts: Parts, ranks: RankGroup) -> list[str]:
    """Write the parts of all ranks into `folder`; the names of the files that this rank wrote.

    Collective. Raises `CheckpointError` on all ranks, naming those that could not write, or what is not all there.
    """
    held = ranks.gather(_description(parts))
    writers = _writers(held)
    _check_complete(held, writers, folder)
    views = {_box(name, piece): part.view(piece) for name, part in parts.items() for piece in part.pieces}
    files = {box: name for rank in range(ranks.size) for name, box in _files(rank, held, writers)}
    mine: list[str] = []

    def write() -> None:
        own = list(_files(ranks.rank, held, writers))
        for name in dict.fromkeys(name for name, _ in own):
            # Copies: what is saved may be strided, or share its memory with others.
            values = {
                box.key: torch.empty(box.sizes, dtype=views[box].dtype).copy_(views[box].detach())
                for file, box in own
                if file == name
            }
            save_file(values, folder / name)
            sync(folder / name)
            mine.append(name)
        if ranks.rank == 0:
            write_durably(folder / INDEX, _index(held, files).model_dump_json(indent=0) + "\n")
            mine.append(INDEX)

    _together(write, f"{folder}: cannot be written", ranks)
    return mine


def read_parts(folder: Path | str, parts: Parts, ranks: RankGroup | None) -> None:
    """Fill `parts`, converting to their types, with all of `ranks` or for this process alone.

    Names and shapes are those that are stored. Raises `CheckpointError`, on all ranks.
    """
    folder = Path(folder)

    def read() -> None:
        index = read_index(folder)
        overlaps = [found for name, part in parts.items() for found in _overlaps(name, part, index)]
        complete = {name: 0 for name in parts}
        for overlap in overlaps:
            complete[overlap.name] += overlap.elements
        if incomplete := [name for name, part in parts.items() if complete[name] != part.tensor.numel()]:
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

    _together(read, f"{folder}: cannot be read", ranks)


def stored_tensors(folder: Path | str) -> dict[str, torch.Tensor]:
    """All whole tensors by name, without their values (device "meta"). Raises `CheckpointError`."""
    return {
        name: torch.empty(stored.shape, dtype=_TYPES[stored.dtype], device="meta")
        for name, stored in read_index(Path(folder)).tensors.items()
    }


def read_index(folder: Path) -> Index:
    """What is stored in `folder`, with no more elements than its files have bytes. Raises `CheckpointError`."""
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


# --- who writes what: each rank works out the same


_Description = Mapping[str, tuple[str, Shape, Sequence[_Box]]]
"""Of what one rank holds: type, whole shape and boxes by name."""


def _description(parts: Parts) -> _Description:
    return {
        name: (
            str(part.tensor.dtype).removeprefix("torch."),
            part.shape,
            [_box(name, piece) for piece in part.pieces],
        )
        for name, part in parts.items()
    }


def _box(name: str, piece: ParameterBox) -> _Box:
    return _Box(name, tuple(s.start for s in piece.whole), tuple(s.stop - s.start for s in piece.whole))


def _bytes(box: _Box, dtype: str) -> int:
    return prod(box.sizes) * _TYPES[dtype].itemsize


def _writers(held: Sequence[_Description]) -> dict[_Box, int]:
    """Which rank writes each box: of those that hold it the one that has the least to write so far."""
    holders: dict[_Box, list[int]] = {}
    sizes: dict[_Box, int] = {}
    for rank, description in enumerate(held):
        for dtype, _, boxes in description.values():
            for box in boxes:
                holders.setdefault(box, []).append(rank)
                sizes[box] = _bytes(box, dtype)
    load = [0] * len(held)
    writers = {}
    # What one rank alone holds is its own in any case, so it comes first.
    for box in sorted(holders, key=lambda box: (len(holders[box]), box.name, box.offsets)):
        writer = min(holders[box], key=lambda rank: (load[rank], rank))
        load[writer] += sizes[box]
        writers[box] = writer
    return writers


def _files(rank: int, held: Sequence[_Description], writers: Mapping[_Box, int]) -> Iterator[tuple[str, _Box]]:
    """The boxes that `rank` writes, each with the name of its file."""
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
    have = dict.fromkeys(shapes, 0)
    for box in writers:
        have[box.name] += prod(box.sizes)
    incomplete = [
        f"{name} ({have[name]} of {prod(shape)} elements)"
        for name, shape in shapes.items()
        if have[name] != prod(shape)
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


# --- what a rank reads


@dataclass(frozen=True)
class _Overlap:
    """What a stored box has of one of a rank's pieces."""

    name: str
    box: StoredBox
    inside: tuple[slice, ...]
    """In the box."""
    target: torch.Tensor

    @property
    def elements(self) -> int:
        return prod(along.stop - along.start for along in self.inside)


def _overlaps(name: str, part: LocalShard, index: Index) -> Iterator[_Overlap]:
    stored = index.tensors.get(name)
    if stored is None or tuple(stored.shape) != part.shape:
        return
    for piece in part.pieces:
        view = part.view(piece)
        for box in stored.boxes:
            inside, here = [], []
            for wanted, offset, size in zip(piece.whole, box.offsets, box.sizes, strict=True):
                start, stop = max(wanted.start, offset), min(wanted.stop, offset + size)
                inside.append(slice(start - offset, stop - offset))
                here.append(slice(start - wanted.start, stop - wanted.start))
            if all(along.start < along.stop for along in inside):
                yield _Overlap(name, box, tuple(inside), view[tuple(here)])


def _together(act: Callable[[], None], what: str, ranks: RankGroup | None) -> None:
    """Do something on every rank; what fails on one is a `CheckpointError` on all, by rank."""
    problem: Exception | None = None
    try:
        act()
    except (OSError, SafetensorError, CheckpointError) as error:
        problem = error
    said = [None if problem is None else str(problem)]
    if ranks is not None:
        said = ranks.gather(said[0])
    reasons = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None)
    if reasons:
        raise CheckpointError(f"{what}: {reasons}") from problem
