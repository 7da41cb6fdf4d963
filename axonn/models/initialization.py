"""Initialization of parameters: each rank fills its shard from name and seed; the full tensor is built nowhere."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from axonn.grid import Coordinates, ProcessGrid
from axonn.placement import Placement
from axonn.tensor.counter_random import AT_ONCE, Indices, normal, stream_key


@dataclass(frozen=True)
class Constant:
    """One value for all elements."""

    value: float


@dataclass(frozen=True)
class Normal:
    """Independent normal values with mean 0."""

    deviation: float


Initial = Constant | Normal


@torch.no_grad()
def fill(
    tensor: torch.Tensor,
    initial: Initial,
    *,
    name: str,
    seed: int,
    placement: Placement | None = None,
    grid: ProcessGrid | None = None,
    coordinates: Coordinates | None = None,
    on: torch.device | None = None,
) -> None:
    """Fill `tensor`, the shard of parameter `name` that the rank at `coordinates` of `grid` holds (default: all of it).

    Element i of the full parameter (in row-major order) is value i of the random stream called `name`. `on`: device
    that computes the values (default: that of `tensor`); devices may differ in the last bit of a normal value.
    """
    if isinstance(initial, Constant):
        tensor.fill_(initial.value)
        return
    placement = placement or Placement(shape=tuple(tensor.shape))
    grid = grid or ProcessGrid()
    key = stream_key(seed, name)
    for local_box, global_box in placement.pieces(grid, coordinates or grid.coordinates(0)):
        piece = tensor[local_box] if local_box else tensor.view(1)
        index = Indices(placement.shape or (1,), global_box or (slice(0, 1),), device=on or tensor.device)
        rows = max(1, AT_ONCE // max(1, prod(piece.shape[1:])))
        for start in range(0, piece.shape[0], rows):
            block = piece[start : start + rows]
            block.copy_(normal(key, index.block(start, start + block.shape[0])).mul_(initial.deviation))
