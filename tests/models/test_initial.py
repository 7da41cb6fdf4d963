"""A rank fills its own part of a parameter with what the whole would have there, and builds no more than that."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import axonn.models.initialization
from axonn.grid import ProcessGrid
from axonn.models.initialization import Constant, Normal, fill
from axonn.placement import Cut, Placement
from axonn.tensor.counter_random import normal, stream_key
from tests.helpers.shard_cases import part_of, placed


def whole_of(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    fill(tensor, Normal(0.5), name="w", seed=3)
    return tensor


@given(placed(most_dims=4), st.sampled_from([1, 2, 7, 1 << 20]))
def test_a_part_is_filled_like_the_slice_of_the_whole(case: tuple[Placement, ProcessGrid], at_once: int) -> None:
    """However many elements are made at once: blocks end anywhere in a piece."""
    placement, grid = case
    whole = whole_of(*placement.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(axonn.models.initialization, "AT_ONCE", at_once)
        for rank in range(grid.size):
            here = grid.coordinates(rank)
            part = torch.full(placement.local_shape(grid), float("nan"), dtype=torch.float64)
            fill(part, Normal(0.5), name="w", seed=3, placement=placement, grid=grid, coordinates=here)
            assert torch.equal(part, part_of(whole, placement, grid, here))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 3, 4), (0, 3)], ids=str)
def test_the_whole_is_the_stream_in_row_major_order(shape: tuple[int, ...]) -> None:
    expected = normal(stream_key(3, "w"), torch.arange(prod(shape))) * 0.5
    assert torch.equal(whole_of(*shape).view(-1), expected)


def test_parts_in_half_precision_are_the_rounded_whole() -> None:
    grid = ProcessGrid(row=2, col=3)
    placement = Placement(shape=(12, 4), cuts=(Cut(0, "col", (6, 6)), Cut(1, "row", (4,))))
    here = grid.coordinates(5)
    part = torch.empty(placement.local_shape(grid), dtype=torch.bfloat16)
    fill(part, Normal(0.5), name="w", seed=3, placement=placement, grid=grid, coordinates=here)
    assert torch.equal(part, part_of(whole_of(12, 4, dtype=torch.bfloat16), placement, grid, here))


def test_a_view_is_filled_in_place() -> None:
    """As the parts that lie in an optimizer's flat buffer are."""
    flat = torch.zeros(10, dtype=torch.float64)
    fill(flat[2:8].view(2, 3), Normal(0.5), name="w", seed=3)
    assert torch.equal(flat[2:8].view(2, 3), whole_of(2, 3))
    assert flat[[0, 1, 8, 9]].tolist() == [0.0] * 4


def test_a_constant_is_the_same_everywhere() -> None:
    grid = ProcessGrid(row=2)
    placement = Placement(shape=(6,), cuts=(Cut(0, "row", (6,)),))
    part = torch.zeros(3)
    fill(part, Constant(1.5), name="w", seed=3, placement=placement, grid=grid, coordinates=grid.coordinates(1))
    assert part.tolist() == [1.5] * 3


@pytest.mark.parametrize("block", [1 << 20, 300])
def test_the_part_of_a_huge_parameter_costs_only_itself(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 TiB in float64, were the whole built anywhere; what is made at once is bounded too."""
    monkeypatch.setattr(axonn.models.initialization, "AT_ONCE", block)
    made: list[int] = []

    def counted(key: int, index: torch.Tensor) -> torch.Tensor:
        made.append(index.numel())
        return normal(key, index)

    monkeypatch.setattr(axonn.models.initialization, "normal", counted)
    size = 1 << 20
    grid = ProcessGrid(row=1 << 12, col=1 << 18)
    half = size // 2
    placement = Placement(shape=(size, size), cuts=(Cut(0, "col", (half, half)), Cut(1, "row", (size,))))
    assert placement.local_shape(grid) == (4, 256)
    here = grid.coordinates(grid.rank(row=17, col=(1 << 18) - 1))
    part = torch.empty(4, 256, dtype=torch.float64)
    fill(part, Normal(1.0), name="w", seed=3, placement=placement, grid=grid, coordinates=here)
    rows = torch.tensor([half - 2, half - 1, size - 2, size - 1]).view(4, 1)
    index = rows * size + torch.arange(17 * 256, 18 * 256)
    assert torch.equal(part, normal(stream_key(3, "w"), index))
    assert sum(made) == part.numel()
    assert max(made) <= block
