"""A placement says of every element which ranks hold it, and of every rank where its elements lie in the whole."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axonn.checkpoint.local_shard import LocalShard
from axonn.errors import GridError
from axonn.grid import Axis, Coordinates, ProcessGrid
from axonn.placement import Cut, ParameterBox, Placement
from tests.helpers.shard_cases import part_of, placed

HERE = Coordinates(0, 0, 0, 0)


@given(placed())
def test_the_pieces_of_all_ranks_tile_the_whole_once_per_replica(case: tuple[Placement, ProcessGrid]) -> None:
    placement, grid = case
    count = torch.zeros(placement.shape, dtype=torch.int64)
    for rank in range(grid.size):
        for piece in placement.pieces(grid, grid.coordinates(rank)):
            count[piece.whole] += 1
    replicas = grid.size // prod(grid.extent(axis) for axis in placement.cut_axes)
    assert bool((count == replicas).all())


@given(placed())
def test_the_pieces_of_a_rank_are_its_part_once(case: tuple[Placement, ProcessGrid]) -> None:
    placement, grid = case
    whole = torch.arange(prod(placement.shape)).view(placement.shape)
    for rank in range(grid.size):
        here = grid.coordinates(rank)
        part = torch.full(placement.local_shape(grid), -1)
        for piece in placement.pieces(grid, here):
            assert bool((part[piece.local] == -1).all()), "two pieces overlap"
            part[piece.local] = whole[piece.whole]
        assert torch.equal(part, part_of(whole, placement, grid, here))


@given(placed())
def test_ranks_hold_the_same_just_where_they_differ_along_other_axes(case: tuple[Placement, ProcessGrid]) -> None:
    placement, grid = case
    whole = torch.arange(prod(placement.shape)).view(placement.shape)
    holds: dict[tuple[int, ...], torch.Tensor] = {}
    for rank in range(grid.size):
        here = grid.coordinates(rank)
        along = tuple(getattr(here, axis) for axis in placement.cut_axes)
        part = part_of(whole, placement, grid, here)
        assert torch.equal(holds.setdefault(along, part), part)
    elements = torch.cat([part.flatten() for part in holds.values()])
    assert sorted(elements.tolist()) == list(range(whole.numel()))


def test_segments_are_cut_each_by_itself() -> None:
    """A fused QKV with two heads of 2 features each: every rank has a head's q, k and v."""
    placement = Placement(shape=(12, 3), cuts=(Cut(0, "col", (4, 4, 4)),))
    grid = ProcessGrid(col=2)
    features = slice(0, 3)
    assert placement.local_shape(grid) == (6, 3)
    assert placement.pieces(grid, grid.coordinates(1)) == [
        ParameterBox((slice(0, 2), features), (slice(2, 4), features)),
        ParameterBox((slice(2, 4), features), (slice(6, 8), features)),
        ParameterBox((slice(4, 6), features), (slice(10, 12), features)),
    ]


def test_segments_may_have_different_lengths() -> None:
    grid = ProcessGrid(row=2)
    pieces = Placement(shape=(10,), cuts=(Cut(0, "row", (2, 8)),)).pieces(grid, grid.coordinates(1))
    assert pieces == [ParameterBox((slice(0, 1),), (slice(1, 2),)), ParameterBox((slice(1, 5),), (slice(6, 10),))]


def test_what_is_not_cut_is_one_piece() -> None:
    grid = ProcessGrid(data=2, inter=2, row=2, col=2)
    for shape in [(), (3,), (2, 4), (0, 3)]:
        box = tuple(slice(0, n) for n in shape)
        for rank in range(grid.size):
            assert Placement(shape=shape).pieces(grid, grid.coordinates(rank)) == [ParameterBox(box, box)]
        assert Placement(shape=shape).local_shape(grid) == shape


@given(st.integers(2, 64), st.integers(1, 100))
def test_an_uneven_segment_is_refused(extent: int, size: int) -> None:
    placement = Placement(shape=(3, size + extent), cuts=(Cut(1, "col", (size, extent)),))
    grid = ProcessGrid(col=extent)
    if size % extent == 0:
        assert placement.local_shape(grid) == (3, size // extent + 1)
        return
    message = rf"{size} of dim 1 of \(3, {size + extent}\) cannot be cut along col = {extent}"
    with pytest.raises(GridError, match=message):
        placement.local_shape(grid)
    with pytest.raises(GridError, match=message):
        placement.pieces(grid, HERE)


@pytest.mark.parametrize(
    ("shape", "cuts", "message"),
    [
        ((4, 6), [(0, "row", (3,))], r"segments \(3,\) do not add up to dim 0 of \(4, 6\)"),
        ((4, 6), [(1, "row", (3, 4))], r"segments \(3, 4\) do not add up to dim 1"),
        ((4, 6), [(2, "row", (3,))], r"\(4, 6\) has no dim 2 to cut along row"),
        ((), [(0, "row", (1,))], r"\(\) has no dim 0"),
        ((4, 6), [(-1, "row", (6,))], r"has no dim -1"),
        ((4, 6), [(0, "row", (4,)), (1, "row", (6,))], r"two cuts of \(4, 6\) have the same dim or axis"),
        ((4, 6), [(0, "row", (4,)), (0, "col", (4,))], r"two cuts of \(4, 6\) have the same dim or axis"),
    ],
)
def test_cuts_that_contradict_the_shape_or_each_other_are_refused(
    shape: tuple[int, ...], cuts: list[tuple[int, Axis, tuple[int, ...]]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(shape=shape, cuts=tuple(Cut(*cut) for cut in cuts))


def test_a_gradient_is_not_summed_over_different_parts() -> None:
    with pytest.raises(ValueError, match=r"\(6,\) is cut along row, where its gradient therefore is no partial sum"):
        Placement(shape=(6,), cuts=(Cut(0, "row", (6,)),), partial=("data", "row"))


def test_cut_axes_are_those_of_the_cuts() -> None:
    cuts = (Cut(1, "row", (6,)), Cut(0, "col", (4,)))
    assert Placement(shape=(4, 6), cuts=cuts).cut_axes == ("row", "col")
    assert Placement(shape=(4, 6)).cut_axes == ()


# --- a part


@given(placed())
def test_a_part_gives_its_pieces_as_views(case: tuple[Placement, ProcessGrid]) -> None:
    placement, grid = case
    here = grid.coordinates(grid.size - 1)
    part = LocalShard.placed(torch.zeros(placement.local_shape(grid)), placement, grid, here)
    assert part.shape == placement.shape
    for piece in part.pieces:
        part.view(piece).add_(1)
    assert bool((part.tensor == 1).all())


def test_a_tensor_that_is_not_the_part_is_refused() -> None:
    placement = Placement(shape=(4, 6), cuts=(Cut(1, "row", (6,)),))
    with pytest.raises(ValueError, match=r"12 elements of a tensor of shape \[4, 6\].* of shape \[4, 6\] has 24"):
        LocalShard.placed(torch.zeros(4, 6), placement, ProcessGrid(row=2), HERE)
    assert LocalShard.whole(torch.zeros(())).shape == ()
