"""Placements and parts for tests: any that there may be, a rank's part of a whole, the whole from all ranks' parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from axonn.checkpoint.local_shard import LocalShard
from axonn.grid import Axis, Coordinates, ProcessGrid
from axonn.placement import Cut, Placement

Tensors = dict[str, torch.Tensor]


@st.composite
def placed(draw: Any, *, most_dims: int = 3) -> tuple[Placement, ProcessGrid]:
    """A placement and a grid that it fits: up to two cuts, each of segments of its own."""
    grid = ProcessGrid(**{axis: draw(st.integers(1, 3)) for axis in ("data", "inter", "row", "col")})
    dims = draw(st.integers(0, most_dims))
    axes: list[Axis] = draw(st.permutations(["row", "col"]))
    cut_dims = draw(st.lists(st.integers(0, dims - 1), unique=True, max_size=2)) if dims else []
    shape = [draw(st.integers(1, 5)) for _ in range(dims)]
    cuts = []
    for dim, axis in zip(cut_dims, axes, strict=False):
        segments = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        cuts.append(Cut(dim, axis, tuple(n * grid.extent(axis) for n in segments)))
        shape[dim] = sum(cuts[-1].segments)
    return Placement(shape=tuple(shape), cuts=tuple(cuts)), grid


def part_of(whole: torch.Tensor, placement: Placement, grid: ProcessGrid, here: Coordinates) -> torch.Tensor:
    """What the rank at `here` holds of `whole`, dim by dim, without the boxes of `Placement.pieces`."""
    part = whole
    for cut in placement.cuts:
        extent, index = grid.extent(cut.axis), getattr(here, cut.axis)
        own = [segment.chunk(extent, cut.dim)[index] for segment in part.split(list(cut.segments), cut.dim)]
        part = torch.cat(own, cut.dim)
    return part.clone()


def detached(parts: Mapping[str, LocalShard]) -> dict[str, LocalShard]:
    """Copies, which do not change and do not carry the buffers that they lie in from rank to rank."""
    return {name: replace(part, tensor=part.tensor.detach().clone()) for name, part in parts.items()}


def assembled(by_rank: Iterable[Mapping[str, LocalShard]]) -> Tensors:
    """The whole tensors: wherever several ranks hold the same elements they have the same bits, and none is missing."""
    wholes: Tensors = {}
    known: Tensors = {}
    for rank, parts in enumerate(by_rank):
        for name, part in parts.items():
            whole = wholes.setdefault(name, torch.zeros(part.shape, dtype=part.tensor.dtype))
            seen = known.setdefault(name, torch.zeros(part.shape, dtype=torch.bool))
            assert tuple(whole.shape) == part.shape
            for piece in part.pieces:
                value, before = part.view(piece), seen[piece.whole]
                assert torch.equal(whole[piece.whole][before], value[before]), f"{name} of rank {rank} differs"
                whole[piece.whole] = value
                seen[piece.whole] = True
    missing = [name for name, seen in known.items() if not seen.all()]
    assert not missing, missing
    return wholes


def wholes(tensors: Tensors) -> dict[str, LocalShard]:
    """The state of one rank that holds everything."""
    return {name: LocalShard.whole(tensor) for name, tensor in tensors.items()}
