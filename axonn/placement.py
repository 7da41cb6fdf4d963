"""Placement of parameters on the grid, from which initialisation, reduction, counting and checkpoints follow."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from axonn.errors import GridError
from axonn.grid import Axis, Coordinates, ProcessGrid

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """A cut of dim number `dim` along `axis`.

    `segments`: lengths of the consecutive segments of the whole dim. Each is cut by itself into equal parts, of which a
    rank holds one (a fused QKV has three segments, so that each rank holds q, k and v of its heads).
    """

    dim: int
    axis: Axis
    segments: tuple[int, ...]


class ParameterBox(NamedTuple):
    """A box of a parameter: its slices in this rank's shard (`local`) and in the whole parameter (`whole`)."""

    local: tuple[slice, ...]
    whole: tuple[slice, ...]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Placement of one parameter on the grid.

    `shape`: shape of the whole parameter. `cuts`: its dims that are cut, each along another axis; along all other axes
    it is replicated. `partial`: axes along which its gradient is still a partial sum after the backward pass.
    `tied_stages`: stages that hold a copy of it (an embedding tied to the head), whose gradients add up; empty for a
    parameter that lives on one stage only. Raises `ValueError` for cuts that do not fit the shape or each other.
    """

    shape: Shape
    cuts: tuple[Cut, ...] = ()
    partial: tuple[Axis, ...] = ("data",)
    tied_stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len({cut.dim for cut in self.cuts}) < len(self.cuts) or len(set(self.cut_axes)) < len(self.cuts):
            raise ValueError(f"two cuts of {self.shape} have the same dim or axis: {self.cuts}")
        for axis in self.partial:
            if axis in self.cut_axes:
                raise ValueError(f"{self.shape} is cut along {axis}, where its gradient therefore is no partial sum")
        for cut in self.cuts:
            if not 0 <= cut.dim < len(self.shape):
                raise ValueError(f"{self.shape} has no dim {cut.dim} to cut along {cut.axis}")
            if sum(cut.segments) != self.shape[cut.dim]:
                raise ValueError(f"segments {cut.segments} do not add up to dim {cut.dim} of {self.shape}")

    @property
    def cut_axes(self) -> tuple[Axis, ...]:
        """Axes along which ranks hold different shards of the parameter."""
        return tuple(cut.axis for cut in self.cuts)

    def pieces(self, grid: ProcessGrid, coordinates: Coordinates) -> list[ParameterBox]:
        """Return the boxes that make up the shard of the rank at `coordinates`. Raises `GridError` as `local_shape`."""
        self.local_shape(grid)
        ranges: list[list[tuple[slice, slice]]] = [[(slice(0, n), slice(0, n))] for n in self.shape]
        for cut in self.cuts:
            ranges[cut.dim] = _segment_ranges(cut, grid.extent(cut.axis), getattr(coordinates, cut.axis))
        return [ParameterBox(tuple(a for a, _ in box), tuple(b for _, b in box)) for box in product(*ranges)]

    def local_shape(self, grid: ProcessGrid) -> Shape:
        """Return the shape of one rank's shard. Raises `GridError` when a segment is not a multiple of its axis."""
        shape = list(self.shape)
        for cut in self.cuts:
            extent = grid.extent(cut.axis)
            uneven = [n for n in cut.segments if n % extent]
            if uneven:
                raise GridError(
                    f"{uneven[0]} of dim {cut.dim} of {self.shape} cannot be cut along {cut.axis} = {extent}"
                )
            shape[cut.dim] //= extent
        return tuple(shape)


def _segment_ranges(cut: Cut, extent: int, index: int) -> list[tuple[slice, slice]]:
    ranges = []
    local_start = segment_start = 0
    for segment in cut.segments:
        length = segment // extent
        start = segment_start + index * length
        ranges.append((slice(local_start, local_start + length), slice(start, start + length)))
        local_start += length
        segment_start += segment
    return ranges
