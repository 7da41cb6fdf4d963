"""The grid: pure arithmetic between ranks and coordinates, for any order of the axes and any number of ranks."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axonn.errors import GridError
from axonn.grid import AXES, Axis, Coordinates, ProcessGrid

ORDERS = list(permutations(AXES))
EXTENT = st.integers(1, 3)
GRIDS = st.builds(ProcessGrid, data=EXTENT, inter=EXTENT, row=EXTENT, col=EXTENT, order=st.sampled_from(ORDERS))
AXIS_SETS = st.lists(st.sampled_from(AXES), unique=True)


@given(GRIDS)
def test_ranks_and_coordinates_are_one_to_one(grid: ProcessGrid) -> None:
    places = [grid.coordinates(rank) for rank in range(grid.size)]
    assert len(set(places)) == grid.size == grid.size
    assert [grid.rank(**place._asdict()) for place in places] == list(range(grid.size))


@given(GRIDS)
def test_the_last_axis_of_the_order_varies_fastest(grid: ProcessGrid) -> None:
    places = [grid.coordinates(rank)._asdict() for rank in range(grid.size)]
    assert places == sorted(places, key=lambda place: [place[axis] for axis in grid.order])


def test_the_default_order_is_data_inter_row_col() -> None:
    grid = ProcessGrid(data=2, inter=3, row=5, col=7)
    assert grid.rank(data=1, inter=2, row=3, col=4) == ((1 * 3 + 2) * 5 + 3) * 7 + 4
    assert grid.coordinates(1 * 105 + 2 * 35 + 3 * 7 + 4) == Coordinates(data=1, inter=2, row=3, col=4)
    assert (grid.size, grid.tensor) == (210, 35)
    assert str(grid) == "G_data=2 x G_inter=3 x G_row=5 x G_col=7"


@given(GRIDS, AXIS_SETS)
def test_groups_partition_the_ranks(grid: ProcessGrid, axes: list[Axis]) -> None:
    groups = grid.groups(axes)
    assert sorted(rank for group in groups for rank in group) == list(range(grid.size))
    fixed = [axis for axis in AXES if axis not in axes]
    for group in groups:
        assert len({tuple(getattr(grid.coordinates(rank), axis) for axis in fixed) for rank in group}) == 1
        assert all(grid.group(rank, axes) == group for rank in group)
        assert list(group) == sorted(group)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)


@given(GRIDS)
def test_neighbours_are_one_stage_apart(grid: ProcessGrid) -> None:
    for rank in range(grid.size):
        here = grid.coordinates(rank)
        after, before = grid.neighbour(rank, 1), grid.neighbour(rank, -1)
        assert (after is None) == (here.inter == grid.inter - 1) == grid.is_last_stage(rank)
        assert (before is None) == (here.inter == 0) == grid.is_first_stage(rank)
        if after is not None:
            assert grid.coordinates(after) == here._replace(inter=here.inter + 1)
            assert grid.neighbour(after, -1) == rank


def test_nodes_hold_consecutive_ranks() -> None:
    grid = ProcessGrid(data=2, inter=4, ranks_per_node=3)
    assert [grid.node(rank) for rank in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert grid.nodes_of([0, 2, 3, 7]) == {0: 2, 1: 1, 2: 1}
    assert ProcessGrid(data=8).nodes_of(range(8)) == {0: 8}


PLANNING = """
import sys
from axonn.grid import AXES, ProcessGrid
grid = ProcessGrid(data=64, inter=32, row=2, col=4, ranks_per_node=8)
assert grid.size == 16384
assert all(grid.rank(**grid.coordinates(r)._asdict()) == r for r in range(0, grid.size, 37))
for axis in AXES:
    groups = grid.groups([axis])
    assert len(groups) == grid.size // grid.extent(axis)
assert len(grid.groups(["row", "col"])) == 2048
assert len(grid.groups(["data", "inter"])) == 8
assert grid.groups(AXES) == [tuple(range(16384))]
assert sum(grid.nodes_of(range(grid.size)).values()) == grid.size
assert "torch" not in sys.modules
"""


def test_16384_ranks_need_no_process_group() -> None:
    """As the planner uses it: not even torch is loaded. The limit only keeps out what is quadratic in the ranks."""
    subprocess.run([sys.executable, "-c", PLANNING], check=True, timeout=100)


def test_two_grids_are_independent_and_immutable() -> None:
    one, other = ProcessGrid(data=2), ProcessGrid(inter=2)
    assert (one.coordinates(1), other.coordinates(1)) == (Coordinates(1, 0, 0, 0), Coordinates(0, 1, 0, 0))
    assert one != other
    assert one == ProcessGrid(data=2)
    with pytest.raises(AttributeError):
        one.data = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": 0}, "axis 'data' is 0; it must be at least 1"),
        ({"col": -2}, "axis 'col' is -2; it must be at least 1"),
        ({"order": ("data", "inter", "row")}, "must name each of"),
        ({"order": ("data", "inter", "row", "row")}, "must name each of"),
        ({"ranks_per_node": 0}, "ranks_per_node is 0"),
    ],
)
def test_an_impossible_grid_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GridError, match=message):
        ProcessGrid(**options)


@settings(max_examples=20)
@given(GRIDS)
def test_ranks_and_coordinates_outside_the_grid_are_refused(grid: ProcessGrid) -> None:
    for rank in (-1, grid.size):
        with pytest.raises(GridError, match=f"rank {rank} is not in the grid"):
            grid.coordinates(rank)
    for axis in AXES:
        for place in (-1, grid.extent(axis)):
            with pytest.raises(GridError, match=f"coordinate {axis}={place} is outside the grid"):
                grid.rank(**{axis: place})


def test_a_grid_that_does_not_fit_the_ranks_says_what_to_change() -> None:
    grid = ProcessGrid(data=2, inter=3)
    grid.check_world(6)
    with pytest.raises(GridError, match=r"needs 6 ranks, but 4 run; change the grid or start 6 ranks"):
        grid.check_world(4)


def test_connecting_without_torch_distributed_is_an_error() -> None:
    with pytest.raises(GridError, match=r"torch\.distributed is not initialised"):
        ProcessGrid(data=2).connect()
