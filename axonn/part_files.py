"""Parts of tensors in the files of `torch.distributed.checkpoint`, whole by name there, whoever holds what.

What is stored is boxes: each of a rank's pieces is one, a piece that several ranks hold is written by one of them, and
a rank reads the boxes that overlap its own. This module loads all of DTensor; it is imported where it is used, so that
a run without checkpoints, or the command that looks for one, need not wait for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from axonn.errors import CheckpointError
from axonn.parts import Part, some_names
from axonn.placement import Piece
from axonn.ranks import Ranks

Parts = Mapping[str, Part]


def write_parts(folder: Path, parts: Parts, ranks: Ranks) -> None:
    """Write the parts of all ranks into `folder`. Collective. Raises `CheckpointError`."""
    with _explained(folder, "written"):
        planner = _SavePlanner(parts)
        save_tensors(_tensors(parts), storage_writer=FileSystemWriter(folder), planner=planner, **ranks.options)


def read_parts(folder: Path | str, parts: Parts, ranks: Ranks | None) -> None:
    """Fill `parts`, converting to their types, with all of `ranks` or for this process alone.

    Names and shapes are those that are stored. Raises `CheckpointError`.
    """
    options = {"no_dist": True} if ranks is None else ranks.options
    with _explained(folder, "read"):
        planner = _LoadPlanner(parts)
        load_tensors(_tensors(parts), storage_reader=FileSystemReader(folder), planner=planner, **options)


def stored_tensors(folder: Path | str) -> dict[str, torch.Tensor]:
    """All whole tensors by name, without their values (device "meta"). Raises `CheckpointError`."""
    try:
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # A damaged pickle raises anything.
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _tensors(parts: Parts) -> dict[str, torch.Tensor]:
    return {name: part.tensor for name, part in parts.items()}


class _SavePlanner(DefaultSavePlanner):
    """Makes an item of each piece; of equal items of several ranks the base class keeps one."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts
        self._views = _views(parts)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [_write_item(name, part, piece) for name, part in self._parts.items() for piece in part.pieces]
        )
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        incomplete = [
            f"{name} ({have} of {wanted} elements)"
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            and (have := sum(prod(chunk.sizes) for chunk in entry.chunks)) != (wanted := prod(entry.size))
        ]
        if incomplete:
            raise ValueError(f"not all of it is on the ranks that save: {some_names(incomplete)}")
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._views[index]


class _LoadPlanner(DefaultLoadPlanner):
    """Reads into each piece what the stored boxes have of it."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts
        self._views = _views(parts)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        incomplete = []
        for name, part in self._parts.items():
            entry = self.metadata.state_dict_metadata.get(name)
            found = []
            if isinstance(entry, TensorStorageMetadata) and tuple(entry.size) == part.shape:
                found = create_read_items_for_chunk_list(name, entry, [_chunk(piece) for piece in part.pieces])
            if sum(prod(item.lengths) for item in found) != part.tensor.numel():
                incomplete.append(name)
            items += found
        if incomplete:
            raise ValueError(f"not all of it is stored: {some_names(incomplete)}")
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._views[index]


def _views(parts: Parts) -> dict[MetadataIndex, torch.Tensor]:
    return {_index(name, piece): part.view(piece) for name, part in parts.items() for piece in part.pieces}


def _index(name: str, piece: Piece) -> MetadataIndex:
    return MetadataIndex(name, _chunk(piece).offsets)


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(
        offsets=torch.Size(along.start for along in piece.whole),
        sizes=torch.Size(along.stop - along.start for along in piece.whole),
    )


def _write_item(name: str, part: Part, piece: Piece) -> WriteItem:
    data = TensorWriteData(
        chunk=_chunk(piece), properties=TensorProperties.create_from_tensor(part.tensor), size=torch.Size(part.shape)
    )
    return WriteItem(index=_index(name, piece), type=WriteItemType.SHARD, tensor_data=data)


@contextmanager
def _explained(folder: Path | str, what: str) -> Iterator[None]:
    """Its errors as ours, and without the warning that there is no process group, which is meant so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            # The ranks' own errors, each without its traceback.
            reasons = "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items()))
            raise CheckpointError(f"{folder}: cannot be {what}: {reasons}") from error
