"""Ordinary modules compute the same on every grid, forward and backward, in sub-shards and not."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.parallel_cases import CASES, STYLES, make, normal
from tests.parallelizing import Outcome, check, kinds, layer
from tests.plain_models import Attention, Block, UNet

EXTENTS = (1, 2, 3, 4)
GRIDS = [(row, col) for row in EXTENTS for col in EXTENTS]


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers[:-1])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("row", "col"), GRIDS)
def test_mlp(row: int, col: int) -> None:
    for depth in (3, 4):
        outcomes = check(mlp(*[12] * (depth + 1)), [normal(4, 12)], row=row, col=col)
        # Along one axis, an even number of layers begins and ends whole; with an odd number the input is cut.
        expected = {"split": 1, "gather": 1} if row > 1 and col > 1 else {"split": 1} if depth % 2 else {}
        expected = expected if row * col > 1 else {}
        for outcome in outcomes:
            assert kinds(outcome) == expected


BY_STYLE = [f"{style} attention" for style in STYLES]
"""Cut on other grids below."""


@pytest.mark.parametrize(
    ("row", "col", "sub_shards"), [(1, 1, 2), (2, 1, 1), (1, 3, 2), (2, 2, 3), (3, 2, 1), (2, 4, 2), (4, 3, 1)]
)
@pytest.mark.parametrize("name", [name for name in CASES if name not in BY_STYLE])
def test_models(name: str, row: int, col: int, sub_shards: int) -> None:
    outcomes = check(make(name), CASES[name].inputs(), row=row, col=col, sub_shards=sub_shards)
    # Rows of some are computed together, as batch norm does in training.
    assert {o.report.sub_shards for o in outcomes} == {1 if CASES[name].mixes_rows else sub_shards}


@pytest.mark.parametrize(("row", "col"), [(2, 2), (1, 4), (3, 2)])
@pytest.mark.parametrize("style", STYLES)
def test_heads_stay_on_their_ranks(style: str, row: int, col: int) -> None:
    outcomes = check(Block(style), [normal(3, 5, 24)], row=row, col=col, sub_shards=2)
    for outcome in outcomes:
        assert outcome.report.sub_shards == 2
        found = kinds(outcome)
        extra = found.pop("sum of gradients", 0)
        assert extra == (0 if style != "multi-query" else extra)
        if style != "multi-query":
            # The heads are cut: only what is whole by contract is cut at the beginning and gathered at the end.
            assert found == ({"split": 1, "gather": 1} if row > 1 and col > 1 else {})
            part = layer(outcome, "attention.projection").input
            assert part is not None
            assert part.form.dim == 2


def test_heads_that_the_extent_does_not_divide_are_gathered_and_it_is_said_why() -> None:
    attention = Attention(24, 3, "separate")
    for outcome in check(attention, [normal(2, 5, 24)], row=2, col=2):
        *gathers, output = outcome.report.of_kind("gather")
        assert len(gathers) == 3
        assert {line.reason for line in gathers} == {"attention mixes positions and features of a head"}
        assert output.reason == "outputs are whole"


class Residual(nn.Module):
    """x + f(x), f of some layers."""

    def __init__(self, depth: int, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.branch = mlp(*[width] * (depth + 1))
        self.last = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y: torch.Tensor = self.last(x + self.branch(x))
        return y


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(("row", "col"), [(2, 2), (2, 3), (3, 4)])
def test_a_path_with_an_odd_number_of_layers_needs_one_redistribution(depth: int, row: int, col: int) -> None:
    for outcome in check(Residual(depth), [normal(4, 12)], row=row, col=col):
        assert kinds(outcome) == {"split": 1, "gather": 1} | ({"redistribute": 1} if depth % 2 else {})


def test_the_cheaper_side_of_a_path_is_laid_out_another_way() -> None:
    class Wide(nn.Module):
        """The sum can be made of 12 features before a layer that makes 48 of them, or of the 48 after it."""

        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(48, 12)
            self.wide = nn.Linear(12, 48)
            self.skip = nn.Linear(12, 48)
            self.narrow = nn.Linear(12, 12)
            self.input = nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.input(x)
            y: torch.Tensor = self.output(self.skip(x) + self.wide(self.narrow(x)))
            return y

    for outcome in check(Wide(), [normal(4, 12)], row=2, col=2):
        (line,) = outcome.report.of_kind("redistribute")
        assert sum(call.elements for call in line.forward) == 4 * 12 // 2


def test_one_gather_serves_all_who_read_it() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            x = self.a(x)
            return x.softmax(-1), x.cumsum(1), x

    for outcome in check(Branches(), [normal(4, 12)], row=2, col=2):
        assert kinds(outcome) == {"split": 1, "gather": 1}


def test_one_redistribution_that_two_paths_share_is_cheaper_than_two_small_ones() -> None:
    class Paths(nn.Module):
        """Either the 12 features that both paths begin with are laid out another way, or 8 of each path."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(12, 12)
            self.a = mlp(12, 8, 8, 12)
            self.b = mlp(12, 8, 8, 12)
            self.one = nn.Linear(12, 12)
            self.two = nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.first(x)
            return self.one(x + self.a(x)), self.two(x + self.b(x))

    for outcome in check(Paths(), [normal(4, 12)], row=2, col=2):
        (line,) = outcome.report.of_kind("redistribute")
        assert line.value == "first"


def test_the_layouts_of_a_u_net() -> None:
    for outcome in check(UNet(), [normal(2, 3, 4, 4), normal(2, 4)], row=2, col=2):
        # Two skips of one layer, the time embedding that both kinds of blocks read, and the output.
        assert len(outcome.report.of_kind("redistribute")) == 3
        assert layer(outcome, "up1.norm1").input.form.segments == (12, 12)
        assert layer(outcome, "up2.conv1").input.form.segments == (24, 24)
        assert layer(outcome, "input").note == "in_channels (3) is no multiple of row = 2 or col = 2"


def expected_calls(outcome: Outcome, module: nn.Module, rows: int) -> Counter[tuple[str, tuple[int, ...], int]]:
    """The collectives of a module of linear layers alone, from its report."""
    context = outcome.parallel.context
    calls: list[tuple[str, Any, int]] = [tuple(call) for call in outcome.report.sent(input_gradients=True)]
    uses = Counter(str(n.target) for n in outcome.parallel.module.graph.nodes if n.op == "call_module")
    for line in outcome.report.layers:
        linear = module.get_submodule(line.name)
        assert isinstance(linear, nn.Linear)
        first, second = (None if s is None else s.axis for s in (line.input, line.output))
        for axis, size, other in ((first, linear.out_features, second), (second, linear.in_features, first)):
            if axis is not None:
                calls += [("all-reduce sum", axis, rows * size // context.extent(other))] * uses[line.name]
    rank = outcome.parallel.context.collectives.rank
    return Counter((kind, context.grid.group(rank, [axis]), elements) for kind, axis, elements in calls)


@pytest.mark.parametrize(("row", "col"), [(2, 2), (3, 2), (2, 4), (1, 3)])
@pytest.mark.parametrize("sub_shards", [1, 2])
def test_what_is_reported_is_what_is_sent(row: int, col: int, sub_shards: int) -> None:
    module = nn.Sequential(Residual(1), nn.Linear(12, 12), Residual(3), nn.Softmax(-1), Residual(2))
    for outcome in check(module, [normal(4, 12)], row=row, col=col, sub_shards=sub_shards):
        found = {(call.kind, call.ranks, call.elements * sub_shards): count for call, count in outcome.calls.items()}
        expected = expected_calls(outcome, module, 4)
        assert found == Counter({call: count * sub_shards for call, count in expected.items()})


class RandomNet(nn.Module):
    """Linear layers, activations and joins as `steps` says."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.steps = steps
        # Defined backwards, so that the order of definition says nothing.
        self.layers = nn.ModuleDict()
        for i in reversed(range(len(steps))):
            if steps[i][0] in ("linear", "shared"):
                self.layers[str(i)] = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for i, (kind, back) in enumerate(self.steps):
            value, other = values[-1], values[-1 - back % len(values)]
            if kind == "linear":
                value = self.layers[str(i)](value)
            elif kind == "shared":
                value = self.layers[str(i)](value) * self.layers[str(i)](other)
            elif kind == "add":
                value = value + other
            elif kind == "mix":
                value = value.softmax(-1)
            else:
                value = F.silu(other)
            values.append(value)
        return values[-1]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["linear", "linear", "linear", "add", "add", "shared", "mix", "silu"]), st.integers(0, 5)
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, grid=st.sampled_from([(2, 2), (1, 3), (3, 2), (4, 1)]), sub_shards=st.integers(1, 3))
def test_random_nets(steps: list[tuple[str, int]], grid: tuple[int, int], sub_shards: int) -> None:
    module = RandomNet(steps).double()
    row, col = grid
    for outcome in check(module, [normal(3, 12)], row=row, col=col, sub_shards=sub_shards):
        assert outcome.report.exact
        assert outcome.report.sub_shards == sub_shards
        if sub_shards == 1 and any(kind in ("linear", "shared") for kind, _ in steps):
            found = {(call.kind, call.ranks, call.elements) for call in outcome.calls}
            assert found <= set(expected_calls(outcome, module, 3))
