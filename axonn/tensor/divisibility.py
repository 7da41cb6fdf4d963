"""Divisibility of a model's layers by the tensor axes of a grid, and the nearest grids that can hold them."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from axonn.errors import GridError
from axonn.grid import ProcessGrid
from axonn.tensor.context import TensorAxis

_SHOWN = 4


@dataclass(frozen=True)
class Requirement:
    """Requirement that `size`, the `quantity` of `layer`, is divisible by the extent of `axis`."""

    layer: str
    quantity: str
    size: int
    axis: TensorAxis


def check_fit(grid: ProcessGrid, *requirements: Requirement) -> None:
    """Raise `GridError` naming each layer whose size the grid does not divide, and the nearest grids that fit all."""
    problems = [
        f"{r.quantity} ({r.size}) of {r.layer} cannot be cut along {r.axis} = {grid.extent(r.axis)}"
        for r in requirements
        if r.size % grid.extent(r.axis)
    ]
    if problems:
        shown = " or ".join(f"G_row={row}, G_col={col}" for row, col in _nearest(grid, requirements))
        raise GridError(f"{'; '.join(problems)}; the nearest grids that work: {shown}")


def _nearest(grid: ProcessGrid, requirements: tuple[Requirement, ...]) -> list[tuple[int, int]]:
    """Return the (row, col) that fit, nearest first: by number of ranks, then by extents, in powers of two."""
    reach = 2 * grid.tensor
    fitting = [
        (row, col)
        for row in range(1, reach + 1)
        for col in range(1, reach // row + 1)
        if all(r.size % (row if r.axis == "row" else col) == 0 for r in requirements)
    ]

    def distance(extents: tuple[int, int]) -> tuple[float, float]:
        row, col = extents
        return abs(log2(row * col / grid.tensor)), abs(log2(row / grid.row)) + abs(log2(col / grid.col))

    return sorted(fitting, key=distance)[:_SHOWN]
