"""Shards that a rank holds of the job's tensors, each with its position in the full tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from axonn.grid import Coordinates, ProcessGrid
from axonn.placement import ParameterBox, Placement, Shape

_SHOWN = 5


@dataclass(frozen=True)
class LocalShard:
    """One rank's shard of a tensor.

    `tensor`: its values, on the rank's device. `shape`: of the full tensor. `pieces`: the boxes that the shard consists
    of. Raises `ValueError` when they do not cover all of `tensor`.
    """

    tensor: torch.Tensor
    shape: Shape
    pieces: tuple[ParameterBox, ...]

    def __post_init__(self) -> None:
        held = sum(box_elements(piece.whole) for piece in self.pieces)
        if held != self.tensor.numel():
            raise ValueError(
                f"{held} elements of a tensor of shape {list(self.shape)} are said to be here, but the part of shape "
                f"{list(self.tensor.shape)} has {self.tensor.numel()}"
            )

    @classmethod
    def placed(
        cls, tensor: torch.Tensor, placement: Placement, grid: ProcessGrid, coordinates: Coordinates
    ) -> LocalShard:
        """Return `tensor` as the shard that the rank at `coordinates` holds under `placement`."""
        return cls(tensor, placement.shape, tuple(placement.pieces(grid, coordinates)))

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> LocalShard:
        """Return a full tensor as its only shard."""
        return cls.placed(tensor, Placement(shape=tuple(tensor.shape)), ProcessGrid(), Coordinates(0, 0, 0, 0))

    def view(self, piece: ParameterBox) -> torch.Tensor:
        """Return the elements of one box as a view of the shard."""
        return self.tensor[piece.local]


def box_elements(box: tuple[slice, ...]) -> int:
    """Return the number of elements in a box; a box without dims is a scalar."""
    return prod(along.stop - along.start for along in box)


def compare_shapes(actual: Mapping[str, Shape], wanted: Mapping[str, Shape], *, have: str, want: str) -> str:
    """Describe how two sets of named shapes differ; return an empty string when they are equal.

    `have`, `want`: what to call the sources of `actual` and `wanted`.
    """
    differences = {
        f"not in {have}": [n for n in wanted if n not in actual],
        f"not in {want}": [n for n in actual if n not in wanted],
        "of another shape": [
            f"{n} ({list(actual[n])} in {have}, {list(wanted[n])} in {want})"
            for n in wanted
            if n in actual and tuple(actual[n]) != tuple(wanted[n])
        ],
    }
    return "; ".join(f"{difference}: {some_names(names)}" for difference, names in differences.items() if names)


def some_names(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(sorted(names)[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
