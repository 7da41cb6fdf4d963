"""What parameters begin with: a rank fills its own part, from name and seed, without the whole being built anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from axonn.grid import Coordinates, ProcessGrid
from axonn.placement import Placement
from axonn.tensor.counter_random import AT_ONCE, Indices, normal, stream_key


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float


@dataclass(frozen=True)
class Normal:
    """Independent normal values of mean 0."""

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
    here: Coordinates | None = None,
    on: torch.device | None = None,
) -> None:
    """Fill `tensor`, the part of parameter `name` that the rank at `here` of `grid` holds; the whole by default.

    Element i of the whole parameter (in row-major order) is value i of the stream called `name`. `on`: where values are
    computed, by default where `tensor` lies; devices may differ in the last bit of a normal value.
    """
    if isinstance(initial, Constant):
        tensor.fill_(initial.value)
        return
    placement = placement or Placement(shape=tuple(tensor.shape))
    grid = grid or ProcessGrid()
    key = stream_key(seed, name)
    for local, whole in placement.pieces(grid, here or grid.coordinates(0)):
        part = tensor[local] if local else tensor.view(1)
        index = Indices(placement.shape or (1,), whole or (slice(0, 1),), device=on or tensor.device)
        rows = max(1, AT_ONCE // max(1, prod(part.shape[1:])))
        for start in range(0, part.shape[0], rows):
            block = part[start : start + rows]
            block.copy_(normal(key, index.block(start, start + block.shape[0])).mul_(initial.deviation))
