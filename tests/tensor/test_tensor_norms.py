"""Norms over features that are cut, and the loss over a vocabulary that is, equal torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from axonn.distributed.collectives import Collectives
from axonn.errors import GridError
from axonn.grid import ProcessGrid
from axonn.tensor import GroupNorm, LayerNorm, RMSNorm, TensorAxis, TensorContext, cross_entropy
from tests.helpers.rank_pool import RankPool
from tests.helpers.tensor_layers import (
    Accumulation,
    Case,
    Input,
    accumulations,
    assert_near,
    compare,
    cut_along,
    extent_of,
    grids,
    on_every_rank,
    with_collectives,
)

axes = st.sampled_from(["row", "col", None])
SIX = ProcessGrid(row=2, col=3)


def norm_case(
    *,
    kind: str,
    grid: ProcessGrid,
    axis: TensorAxis | None,
    leading: tuple[int, ...],
    parts: int,
    rows: tuple[int, ...],
    options: dict[str, Any],
    offset: float = 0.0,
    accumulation: Accumulation = "autograd",
) -> Case:
    """`leading`: dims that are normalised too, but not cut."""
    size = parts * extent_of(grid, axis)
    shape = (*rows, *leading, size)
    ours, torchs = {"layer": (LayerNorm, nn.LayerNorm), "rms": (RMSNorm, nn.RMSNorm)}[kind]
    normalized: Any = (*leading, size) if leading else size
    lies = cut_along(len(shape) - 1, axis, [size])
    return Case(
        grid=grid,
        serial=partial(torchs, normalized, **options),
        parallel=partial(ours, normalized, axis=axis, **options),
        inputs=(Input(shape, lies, offset=offset),),
        output=lies,
        accumulation=accumulation,
    )


epsilons = st.sampled_from([1e-5, 1e-2])


@settings(max_examples=80)
@given(
    st.builds(
        norm_case,
        kind=st.just("layer"),
        grid=grids,
        axis=axes,
        leading=st.sampled_from([(), (3,), (2, 2)]),
        parts=st.integers(2, 4),
        rows=st.sampled_from([(), (3,), (2, 3), (2, 1, 3)]),
        options=st.fixed_dictionaries(
            {}, optional={"eps": epsilons, "elementwise_affine": st.booleans(), "bias": st.booleans()}
        ),
        accumulation=accumulations,
    )
)
def test_layer_norm(case: Case) -> None:
    compare(case)


@settings(max_examples=80)
@given(
    st.builds(
        norm_case,
        kind=st.just("rms"),
        grid=grids,
        axis=axes,
        leading=st.sampled_from([(), (3,), (2, 2)]),
        parts=st.integers(2, 4),
        rows=st.sampled_from([(), (3,), (2, 3), (2, 1, 3)]),
        options=st.fixed_dictionaries({}, optional={"eps": epsilons | st.none(), "elementwise_affine": st.booleans()}),
        accumulation=accumulations,
    )
)
def test_rms_norm(case: Case) -> None:
    compare(case)


def group_case(
    *,
    grid: ProcessGrid,
    axis: TensorAxis | None,
    parts: list[int],
    groups: int,
    batch: int,
    image: tuple[int, ...],
    options: dict[str, Any],
    offset: float = 0.0,
    accumulation: Accumulation = "autograd",
) -> Case:
    """`groups` chooses one of the possible numbers."""
    segments = [n * extent_of(grid, axis) for n in parts]
    channels = sum(segments)
    divisors = [n for n in range(1, channels + 1) if channels % n == 0]
    chosen = divisors[groups % len(divisors)]
    lies = cut_along(1, axis, segments)
    return Case(
        grid=grid,
        serial=partial(nn.GroupNorm, chosen, channels, **options),
        parallel=partial(GroupNorm, chosen, channels, axis=axis, segments=segments, **options),
        inputs=(Input((batch, channels, *image), lies, offset=offset),),
        output=lies,
        accumulation=accumulation,
    )


@settings(max_examples=150)
@given(
    st.builds(
        group_case,
        grid=grids,
        axis=axes,
        parts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        groups=st.integers(0, 30),
        batch=st.integers(1, 3),
        image=st.sampled_from([(2, 3), (4,), (1, 2, 3)]),
        options=st.fixed_dictionaries({}, optional={"eps": epsilons, "affine": st.booleans()}),
        accumulation=accumulations,
    )
)
def test_group_norm(case: Case) -> None:
    compare(case)


def test_group_norm_of_values_without_an_image() -> None:
    compare(group_case(grid=SIX, axis="col", parts=[4], groups=1, batch=3, image=(), options={}))


def communicated(grid: ProcessGrid, make: Callable[..., nn.Module], shape: tuple[int, ...]) -> list[list[str]]:
    """Collectives of a forward and a backward, by rank."""

    def operations(collectives: Collectives) -> list[str]:
        layer = make(context=TensorContext(grid, collectives.rank, collectives), dtype=torch.float64)
        for parameter in layer.parameters():
            nn.init.ones_(parameter)
        x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        layer(x).sum().backward()
        return [f"{call.kind} {call.elements}" for call in collectives.calls.elements()]

    return with_collectives(grid, operations)


def test_groups_that_lie_on_one_rank_need_no_communication() -> None:
    found = communicated(SIX, partial(GroupNorm, 6, 12, axis="col"), (2, 4, 5))
    assert found == [[]] * 6
    found = communicated(SIX, partial(GroupNorm, 4, 12, axis="row", segments=[6, 6]), (2, 6, 5))
    assert found == [[]] * 6


def test_groups_that_cross_ranks_cost_two_values_each() -> None:
    """Of 4 groups of 3 channels on 2 ranks of 4 + 2 channels, by two segments, all but the first cross."""
    # Rank 0 has channels 0-3 and 8-9, rank 1 has 4-7 and 10-11; of the groups 0-2, 3-5, 6-8, 9-11 the first is alone.
    found = communicated(SIX, partial(GroupNorm, 4, 12, axis="row", segments=[8, 4]), (5, 6, 7))
    assert found == [["all-gather 30", "all-reduce sum 30"]] * 6


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_large_means_cost_no_digits(kind: str) -> None:
    """Of values near 1e6 with variance 1, sums of squares would keep 4 digits of the variance; here 10 remain, as many
    as the input has."""
    if kind == "layer":
        case = norm_case(kind="layer", grid=SIX, axis="col", leading=(), parts=4, rows=(5,), options={}, offset=1e6)
    else:
        case = group_case(grid=SIX, axis="col", parts=[4], groups=1, batch=2, image=(3,), options={}, offset=1e6)
    compare(case, tolerance=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("serial", "parallel"),
    [
        (partial(nn.LayerNorm, 12), partial(LayerNorm, 12, axis="col")),
        (partial(nn.RMSNorm, 12), partial(RMSNorm, 12, axis="col")),
        (partial(nn.GroupNorm, 2, 12), partial(GroupNorm, 2, 12, axis="col")),
    ],
)
def test_half_types_are_computed_in_float32(
    dtype: torch.dtype, serial: Callable[..., nn.Module], parallel: Callable[..., nn.Module]
) -> None:
    whole = (torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    expected = serial(dtype=dtype)(whole).detach()

    def error(context: TensorContext, rank: int) -> float:
        layer = parallel(context=context, dtype=dtype)
        for name, parameter in layer.named_parameters():
            nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)
        columns = slice(4 * context.index("col"), 4 * context.index("col") + 4)
        with torch.no_grad():
            y = layer(whole[:, columns].contiguous())
        assert y.dtype == dtype
        return float((y - expected[:, columns]).abs().max())

    assert max(on_every_rank(SIX, error)) <= 4 * torch.finfo(dtype).eps


class SerialLoss(nn.Module):
    def __init__(self, targets: torch.Tensor) -> None:
        super().__init__()
        self.targets = targets

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, self.targets)


class ParallelLoss(nn.Module):
    def __init__(self, targets: torch.Tensor, axis: TensorAxis | None, *, context: TensorContext) -> None:
        super().__init__()
        self.targets, self.axis, self.context = targets, axis, context

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, self.targets, context=self.context, axis=self.axis)


def loss_case(*, grid: ProcessGrid, axis: TensorAxis | None, parts: int, rows: int, offset: float) -> Case:
    vocabulary = parts * extent_of(grid, axis)
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(2))
    return Case(
        grid=grid,
        serial=partial(SerialLoss, targets),
        parallel=partial(ParallelLoss, targets, axis),
        inputs=(Input((rows, vocabulary), cut_along(1, axis, [vocabulary]), offset=offset),),
    )


@settings(max_examples=60)
@given(
    st.builds(
        loss_case,
        grid=grids,
        axis=axes,
        parts=st.integers(1, 4),
        rows=st.integers(1, 5),
        # Without the largest logit taken off, exponentials would overflow or vanish.
        offset=st.sampled_from([0.0, 1000.0, -1000.0]),
    )
)
def test_cross_entropy(case: Case) -> None:
    compare(case)


def test_cross_entropy_of_half_precision_logits_is_computed_in_float32() -> None:
    logits = torch.randn(8, 12, generator=torch.Generator().manual_seed(3)).bfloat16() * 3
    targets = torch.arange(8)

    def loss(context: TensorContext, rank: int) -> torch.Tensor:
        columns = slice(4 * context.index("col"), 4 * context.index("col") + 4)
        return cross_entropy(logits[:, columns], targets, context=context)

    for found in on_every_rank(SIX, loss):
        assert_near(found, F.cross_entropy(logits.float(), targets), "loss", 1e-6)


@pytest.mark.parametrize(
    "case",
    [
        norm_case(kind="layer", grid=SIX, axis="row", leading=(2,), parts=3, rows=(4,), options={}),
        norm_case(kind="rms", grid=SIX, axis="col", leading=(), parts=3, rows=(4,), options={}),
        group_case(grid=SIX, axis="row", parts=[4, 2], groups=2, batch=2, image=(3, 3), options={}),
        loss_case(grid=SIX, axis="col", parts=3, rows=5, offset=0.0),
    ],
    ids=["layer norm", "rms norm", "group norm", "cross-entropy"],
)
def test_over_gloo(case: Case, pool: RankPool) -> None:
    compare(case, pool)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (partial(LayerNorm, 9), GridError, r"normalized_shape of LayerNorm\(9\) \(9\).*row = 2.*multiple of 2"),
        (partial(LayerNorm, (4, 9)), GridError, r"normalized_shape of LayerNorm\(\(4, 9\)\) \(9\).*row = 2"),
        (partial(RMSNorm, 8, axis="col"), GridError, r"normalized_shape of RMSNorm\(8\) \(8\).*col = 3"),
        (partial(GroupNorm, 3, 9), GridError, r"num_channels of GroupNorm\(3, 9\) \(9\).*row = 2"),
        (partial(GroupNorm, 2, 8, segments=[3, 5]), GridError, r"num_channels of GroupNorm\(2, 8\) \(3\).*row = 2"),
        (partial(GroupNorm, 2, 8, segments=[4, 2]), ValueError, "do not add up to 8"),
        (partial(GroupNorm, 3, 8), ValueError, "multiple of num_groups"),
        (partial(LayerNorm, ()), ValueError, "normalized_shape of LayerNorm is empty"),
    ],
)
def test_sizes_that_cannot_be_cut_are_named(make: Callable[..., nn.Module], error: type[Exception], words: str) -> None:
    def refused(context: TensorContext, rank: int) -> bool:
        with pytest.raises(error, match=words):
            make(context=context)
        return True

    assert all(on_every_rank(SIX, refused))
