"""What a rank holds of the tensors of the whole job: its part of each, and where in the whole that lies."""

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
    """One rank's part of a tensor.

    `tensor`: the part, where it lies. `shape`: of the whole. `pieces`: the boxes that the part consists of. Raises
    `ValueError` when they are not all of `tensor`.
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
    def placed(cls, tensor: torch.Tensor, placement: Placement, grid: ProcessGrid, here: Coordinates) -> LocalShard:
        """`tensor` as what the rank at `here` holds of something placed so."""
        return cls(tensor, placement.shape, tuple(placement.pieces(grid, here)))

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> LocalShard:
        """A tensor that is all here."""
        return cls.placed(tensor, Placement(shape=tuple(tensor.shape)), ProcessGrid(), Coordinates(0, 0, 0, 0))

    def view(self, piece: ParameterBox) -> torch.Tensor:
        """The elements of one box, as a view of the part."""
        return self.tensor[piece.local]


def box_elements(box: tuple[slice, ...]) -> int:
    """How many elements a box has; one without dims is a scalar."""
    return prod(along.stop - along.start for along in box)


def compare_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape], *, have: str, want: str) -> str:
    """What differs between two sets of named shapes, in words; empty when nothing does."""
    differences = {
        f"not in {have}": [n for n in wanted if n not in found],
        f"not in {want}": [n for n in found if n not in wanted],
        "of another shape": [
            f"{n} ({list(found[n])} in {have}, {list(wanted[n])} in {want})"
            for n in wanted
            if n in found and tuple(found[n]) != tuple(wanted[n])
        ],
    }
    return "; ".join(f"{what}: {some_names(names)}" for what, names in differences.items() if names)


def some_names(names: list[str]) -> str:
    """The first few of them, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(sorted(names)[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
