"""Activations cut, gathered and laid out along the other axis, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from axonn.distributed.collectives import Collectives
from axonn.errors import GridError
from axonn.grid import ProcessGrid
from axonn.tensor import TensorAxis, TensorContext, gather, redistribute, split
from tests.helpers.rank_pool import RankPool
from tests.helpers.tensor_layers import (
    Case,
    Input,
    compare,
    cut_along,
    extent_of,
    grids,
    on_every_rank,
    with_collectives,
)

ROW_AND_COL: list[tuple[TensorAxis | None, TensorAxis | None]] = [
    ("row", "col"),
    ("col", "row"),
    ("row", None),
    ("col", None),
    (None, "row"),
    (None, "col"),
    (None, None),
    ("row", "row"),
]


@dataclass(eq=False)
class Moved(nn.Module):
    """From cut along `source` to cut along `target`, by the function made for it."""

    dim: int
    source: TensorAxis | None
    target: TensorAxis | None
    segments: list[int]
    context: TensorContext
    always_redistribute: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.source is None and not self.always_redistribute:
            return split(x, self.dim, self.target, context=self.context, segments=self.segments)
        if self.target is None and not self.always_redistribute:
            return gather(x, self.dim, self.source, context=self.context, segments=self.segments)
        return redistribute(
            x, self.dim, source=self.source, target=self.target, context=self.context, segments=self.segments
        )


def move_case(
    *,
    grid: ProcessGrid,
    axes: tuple[TensorAxis | None, TensorAxis | None],
    shape: tuple[int, ...],
    dim: int,
    parts: list[int],
    always_redistribute: bool = False,
) -> Case:
    """`shape`: of the other dims, among which the moved one becomes number `dim`."""
    source, target = axes
    segments = [n * extent_of(grid, "row") * extent_of(grid, "col") for n in parts]
    place = dim % (len(shape) + 1)
    whole = (*shape[:place], sum(segments), *shape[place:])
    given_dim = place if dim >= 0 else place - len(whole)
    return Case(
        grid=grid,
        serial=nn.Identity,
        parallel=partial(_moved, given_dim, source, target, segments, always_redistribute),
        inputs=(Input(whole, cut_along(place, source, segments)),),
        output=cut_along(place, target, segments),
    )


def _moved(dim: int, *args: Any, context: TensorContext) -> nn.Module:
    *how, always_redistribute = args
    return Moved(dim, *how, context, always_redistribute)


@settings(max_examples=120)
@given(
    st.builds(
        move_case,
        grid=grids,
        axes=st.sampled_from(ROW_AND_COL),
        shape=st.sampled_from([(), (2,), (2, 3), (1, 2, 2)]),
        dim=st.integers(-3, 3),
        parts=st.lists(st.integers(1, 2), min_size=1, max_size=3),
        always_redistribute=st.booleans(),
    )
)
def test_a_layout_is_changed_forward_and_back(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("axes", [("row", "col"), ("col", "row"), ("col", None), (None, "row")])
def test_over_gloo(axes: tuple[TensorAxis | None, TensorAxis | None], pool: RankPool) -> None:
    compare(move_case(grid=ProcessGrid(row=2, col=3), axes=axes, shape=(2, 2), dim=1, parts=[1, 2]), pool)


def test_the_uneven_parts_of_two_axes() -> None:
    """3 parts of 8 along one axis, 2 of 12 along the other: no part is made of whole other ones."""
    compare(move_case(grid=ProcessGrid(row=3, col=2), axes=("row", "col"), shape=(2,), dim=-1, parts=[4]))
    compare(move_case(grid=ProcessGrid(row=2, col=3), axes=("row", "col"), shape=(2,), dim=-1, parts=[4]))


def sent(grid: ProcessGrid, source: TensorAxis, target: TensorAxis) -> list[list[str]]:
    """Collectives of moving 24 elements forth, and of their gradient, by rank."""

    def operations(collectives: Collectives) -> list[str]:
        context = TensorContext(grid, collectives.rank, collectives)
        x = torch.zeros(24 // grid.extent(source), requires_grad=True)
        redistribute(x, 0, source=source, target=target, context=context).sum().backward()
        return [f"{call.kind} {call.elements} over {len(call.ranks)}" for call in collectives.calls.elements()]

    return with_collectives(grid, operations)


def test_a_relayout_sends_what_is_least() -> None:
    """A gather of the parts, or where the wanted part is small a sum of what each rank has of it."""
    assert sent(ProcessGrid(row=2, col=2), "row", "col") == [["all-gather 12 over 2"] * 2] * 4
    forth, back = "all-reduce sum 6 over 2", "all-gather 6 over 4"
    assert sent(ProcessGrid(row=2, col=4), "row", "col") == [[forth, back]] * 8
    assert sent(ProcessGrid(row=4, col=2), "col", "row") == [[forth, back]] * 8
    assert sent(ProcessGrid(row=1, col=4), "row", "col") == [["all-gather 6 over 4"]] * 4


def test_what_cannot_be_cut_is_named() -> None:
    def error(context: TensorContext, rank: int) -> list[str]:
        messages = []
        for attempt in (
            partial(split, torch.zeros(2, 7), 1, "col"),
            partial(redistribute, torch.zeros(2, 7), -1, source="row", target="col"),
            partial(split, torch.zeros(2, 6), 1, "col", segments=[2, 4]),
        ):
            with pytest.raises(GridError) as raised:
                attempt(context=context)
            messages.append(str(raised.value))
        with pytest.raises(ValueError, match="do not add up to 12"):
            gather(torch.zeros(2, 6), 1, "row", context=context, segments=[6])
        return messages

    for first, second, third in on_every_rank(ProcessGrid(row=2, col=3), error):
        assert "dim 1 of a tensor [2, 7] (7) cannot be cut along col = 3" in first
        assert "dim -1 of a tensor [2, 7] (14) cannot be cut along col = 3" in second
        assert "dim 1 of a tensor [2, 6] (2) cannot be cut along col = 3" in third
