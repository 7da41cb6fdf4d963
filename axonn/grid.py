"""The process grid: which rank computes which part of the model and of the batch.

Pure arithmetic: no process group is needed, so the planner, the simulator and the job scripts use it for any number
of ranks. `ProcessGrid.connect` builds the communicators in a running job.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from pydantic import Field, create_model

from axonn.config.loading import FileValue, StrictModel, validate
from axonn.errors import GridError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Axis = Literal["data", "inter", "row", "col"]
AXES: tuple[Axis, ...] = ("data", "inter", "row", "col")
TENSOR_AXES: tuple[Axis, ...] = ("row", "col")
"""Axes along which layers are cut."""
_EXTENTS: dict[str, Any] = dict.fromkeys(AXES, (int, Field(default=1, ge=1)))
GridExtents: type[StrictModel] = create_model("GridExtents", __base__=StrictModel, **_EXTENTS)
"""Schema of a grid in a file: its extents."""


class Coordinates(NamedTuple):
    """Position of a rank on each axis of the grid."""

    data: int
    inter: int
    row: int
    col: int


@dataclass(frozen=True, kw_only=True)
class ProcessGrid(FileValue):
    """A grid of data x inter x row x col ranks.

    `order` lists the axes from the slowest to the fastest varying one; ranks are numbered and placed on nodes in that
    order. In a file a grid is its extents, by axis. Raises `GridError` when an extent is not a positive integer or
    `order` is not a permutation of the axes.
    """

    data: int = 1
    inter: int = 1
    row: int = 1
    col: int = 1
    order: tuple[Axis, ...] = AXES
    ranks_per_node: int | None = None

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.extent(axis) < 1:
                raise GridError(f"grid axis '{axis}' is {self.extent(axis)}; it must be at least 1")
        if sorted(self.order) != sorted(AXES):
            raise GridError(f"grid order {self.order} must name each of {AXES} once")
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise GridError(f"ranks_per_node is {self.ranks_per_node}; it must be at least 1")

    def __str__(self) -> str:
        return " x ".join(f"G_{axis}={self.extent(axis)}" for axis in AXES)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return prod(self.extents().values())

    @property
    def tensor(self) -> int:
        """G_tensor = G_row x G_col: number of ranks that share a layer."""
        return prod(self.extent(axis) for axis in TENSOR_AXES)

    @classmethod
    def of(cls, extents: object, *, where: str) -> Self:
        """Return the grid with these extents by axis. Raises `ConfigError` naming `where` and the key."""
        return cls(**validate(extents, GridExtents, where=where).model_dump())

    def extents(self) -> dict[str, int]:
        """Return the number of ranks along each axis."""
        return {axis: self.extent(axis) for axis in AXES}

    @cached_property
    def _strides(self) -> dict[Axis, int]:
        """Distance in rank numbers between neighbours along each axis."""
        strides: dict[Axis, int] = {}
        stride = 1
        for axis in reversed(self.order):
            strides[axis] = stride
            stride *= self.extent(axis)
        return strides

    def extent(self, axis: Axis) -> int:
        """Return the number of ranks along `axis`."""
        value = getattr(self, axis)
        assert isinstance(value, int)
        return value

    @classmethod
    def file_keys(cls) -> type[StrictModel]:
        return GridExtents

    def check_world(self, world_size: int) -> None:
        """Raise `GridError` unless the grid uses exactly `world_size` ranks."""
        if self.size != world_size:
            raise GridError(
                f"the grid {self} needs {self.size} ranks, but {world_size} run; "
                f"change the grid or start {self.size} ranks"
            )

    def coordinates(self, rank: int) -> Coordinates:
        """Return the coordinates of `rank`. Raises `GridError` when the rank is not in the grid."""
        if not 0 <= rank < self.size:
            raise GridError(f"rank {rank} is not in the grid {self} of {self.size} ranks")
        indices: dict[str, int] = {}
        for axis in reversed(self.order):
            rank, indices[axis] = divmod(rank, self.extent(axis))
        return Coordinates(**indices)

    def rank(self, *, data: int = 0, inter: int = 0, row: int = 0, col: int = 0) -> int:
        """Return the rank at these coordinates. Raises `GridError` when they lie outside the grid."""
        indices = {"data": data, "inter": inter, "row": row, "col": col}
        rank = 0
        for axis in self.order:
            if not 0 <= indices[axis] < self.extent(axis):
                raise GridError(f"coordinate {axis}={indices[axis]} is outside the grid {self}")
            rank = rank * self.extent(axis) + indices[axis]
        return rank

    def group(self, rank: int, axes: Iterable[Axis]) -> tuple[int, ...]:
        """Return the ranks that differ from `rank` along `axes` only, itself included, in the order of the grid."""
        coordinates, strides, free = self.coordinates(rank), self._strides, set(axes)
        members = [rank - sum(getattr(coordinates, axis) * strides[axis] for axis in free)]
        for axis in self.order:
            if axis in free:
                steps = range(0, self.extent(axis) * strides[axis], strides[axis])
                members = [m + step for m in members for step in steps]
        return tuple(members)

    def groups(self, axes: Iterable[Axis]) -> list[tuple[int, ...]]:
        """Return all disjoint groups along `axes`, ordered by their first rank."""
        along = tuple(axes)
        groups: list[tuple[int, ...]] = []
        seen: set[int] = set()
        for rank in range(self.size):
            if rank not in seen:
                groups.append(self.group(rank, along))
                seen.update(groups[-1])
        return groups

    def neighbour(self, rank: int, step: int) -> int | None:
        """Return the rank `step` stages further along the pipeline, or None past its ends."""
        stage = self.coordinates(rank).inter + step
        if not 0 <= stage < self.inter:
            return None
        return rank + step * self._strides["inter"]

    def is_first_stage(self, rank: int) -> bool:
        """Return True if `rank` is on the first stage, which reads the inputs."""
        return self.coordinates(rank).inter == 0

    def is_last_stage(self, rank: int) -> bool:
        """Return True if `rank` is on the last stage, which computes the loss."""
        return self.coordinates(rank).inter == self.inter - 1

    def node(self, rank: int) -> int:
        """Return the number of the node that `rank` runs on; without `ranks_per_node` there is one node."""
        return 0 if self.ranks_per_node is None else rank // self.ranks_per_node

    def nodes_of(self, ranks: Sequence[int]) -> dict[int, int]:
        """Return how many of `ranks` run on each node."""
        counts: dict[int, int] = {}
        for rank in ranks:
            counts[self.node(rank)] = counts.get(self.node(rank), 0) + 1
        return counts

    def connect(self, device_type: str = "cpu") -> DeviceMesh:
        """Build the communicators of a running job (collective over all its ranks).

        `torch.distributed` must be initialised with `size` ranks. Raises `GridError` otherwise.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        if not dist.is_initialized():
            raise GridError("torch.distributed is not initialised: start it before connecting the grid")
        self.check_world(dist.get_world_size())
        shape = [self.extent(axis) for axis in self.order]
        mesh = torch.arange(prod(shape)).reshape(shape)
        return DeviceMesh(device_type, mesh, mesh_dim_names=tuple(self.order))
