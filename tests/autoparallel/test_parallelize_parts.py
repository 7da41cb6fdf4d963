"""The search for layouts against trying them all, and what becomes of a cut when a tensor is reshaped."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axonn.autoparallel.layouts.min_cost_search import minimise
from axonn.autoparallel.layouts.shardings import Form, Shard, pieces, reshaped, splits


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[np.ndarray], dict[tuple[int, int], np.ndarray]]:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=7))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    every = [(i, j) for i in range(len(sizes)) for j in range(len(sizes)) if i != j]
    chosen = draw(st.lists(st.sampled_from(every), unique=True, max_size=12)) if every else []
    single = [random.integers(0, 20, n).astype(float) for n in sizes]
    return single, {(i, j): random.integers(0, 20, (sizes[i], sizes[j])).astype(float) for i, j in chosen}


def cost(single: list[np.ndarray], pairs: dict[tuple[int, int], np.ndarray], choices: tuple[int, ...]) -> float:
    own = sum(c[i] for c, i in zip(single, choices, strict=True))
    return float(own + sum(c[choices[i], choices[j]] for (i, j), c in pairs.items()))


@settings(deadline=None)
@given(problems())
def test_nothing_is_cheaper_than_what_the_search_finds(
    problem: tuple[list[np.ndarray], dict[tuple[int, int], np.ndarray]],
) -> None:
    single, pairs = problem
    found = minimise(single, pairs)
    best = min(cost(single, pairs, choices) for choices in product(*(range(len(c)) for c in single)))
    assert found.exact
    assert cost(single, pairs, tuple(found.choices)) == best


@settings(deadline=None)
@given(problems())
def test_with_small_tables_every_variable_still_has_a_choice(
    problem: tuple[list[np.ndarray], dict[tuple[int, int], np.ndarray]],
) -> None:
    single, pairs = problem
    found = minimise(single, pairs, largest=4)
    assert all(0 <= choice < len(costs) for choice, costs in zip(found.choices, single, strict=True))
    if found.exact:
        assert found.choices == minimise(single, pairs).choices


def test_a_long_chain_is_searched_exactly() -> None:
    random = np.random.default_rng(0)
    pairs = {(i, i + 1): random.random((4, 4)) for i in range(5000)}
    found = minimise([np.zeros(4)] * 5001, pairs)
    assert found.exact
    best = np.zeros(4)
    for i in range(5000):
        best = (best[:, None] + pairs[i, i + 1]).min(0)
    assert cost([np.zeros(4)] * 5001, pairs, tuple(found.choices)) == pytest.approx(best.min())


def test_a_knot_is_cut() -> None:
    random = np.random.default_rng(0)
    every = [(i, j) for i in range(12) for j in range(i)]
    single, pairs = [np.zeros(4)] * 12, {pair: random.random((4, 4)) for pair in every}
    found = minimise(single, pairs, largest=1000)
    assert not found.exact
    some = [cost(single, pairs, tuple(random.integers(0, 4, 12))) for _ in range(50)]
    assert cost(single, pairs, tuple(found.choices)) < np.mean(some)


def part(x: torch.Tensor, form: Form, extent: int, index: int) -> torch.Tensor:
    return torch.cat([s.chunk(extent, form.dim)[index] for s in x.split(form.segments, form.dim)], form.dim)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], Form, int]:
    """Two shapes of the same elements, made by joining the same factors differently, and a form of the first."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=5))

    def joined() -> tuple[int, ...]:
        borders = sorted(draw(st.sets(st.integers(1, len(factors)), max_size=3)) | {0, len(factors)})
        return tuple(prod(factors[a:b]) for a, b in pairwise(borders))

    source, target = joined(), joined()
    dim = draw(st.integers(0, len(source) - 1))
    extent = draw(st.sampled_from([1, 2, 3]))
    count = draw(st.sampled_from([1, 2, 3]))
    size = source[dim]
    segments = (size // count,) * count if size % count == 0 else (size,)
    return source, target, Form(dim, segments), extent


@settings(max_examples=300, deadline=None)
@given(reshapes())
def test_a_part_reshaped_is_the_part_of_what_is_reshaped(
    case: tuple[tuple[int, ...], tuple[int, ...], Form, int],
) -> None:
    source, target, form, extent = case
    found = reshaped(form, source, target)
    if found is None or not form.divides(extent) or not found.divides(extent):
        return
    x = torch.arange(prod(source)).view(source)
    for index in range(extent):
        expected = part(x.view(target), found, extent, index)
        assert torch.equal(part(x, form, extent, index).reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("source", "target", "form", "expected"),
    [
        ((2, 5, 24), (2, 5, 6, 4), Form(2, (24,)), Form(2, (6,))),
        ((2, 5, 72), (2, 5, 3, 6, 4), Form(2, (24,) * 3), Form(3, (6,))),
        ((2, 5, 6, 4), (2, 5, 24), Form(2, (6,)), Form(2, (24,))),
        ((2, 8, 3, 3), (2, 72), Form(1, (4, 4)), Form(1, (36, 36))),
        ((2, 6, 5, 4), (12, 5, 4), Form(1, (6,)), Form(0, (6, 6))),
        ((12, 5, 4), (2, 6, 5, 4), Form(0, (6, 6)), Form(1, (6,))),
        ((2, 24), (2, 24, 1, 1), Form(1, (24,)), Form(1, (24,))),
        ((2, 6), (3, 4), Form(1, (6,)), None),
        ((2, 6), (12,), Form(1, (4, 2)), Form(0, (4, 2, 4, 2))),
    ],
)
def test_reshaped(source: tuple[int, ...], target: tuple[int, ...], form: Form, expected: Form | None) -> None:
    assert reshaped(form, source, target) == expected


def test_splits_and_pieces() -> None:
    assert splits((2, 5, 72), (2, 5, 3, 6, 4)) == [Form(2, (3,)), Form(3, (6,)), Form(4, (4,))]
    assert splits((2, 5, 6, 4), (2, 5, 24)) == []
    assert pieces(Form(1, (4, 4, 8)), [8, 8]) == [Form(1, (4, 4)), Form(1, (8,))]
    assert pieces(Form(1, (16,)), [8, 8]) is None
    assert str(Shard("row", Form(2, (4, 8)))) == "dim 2 along row in segments 4 + 8"
    assert str(Shard("col", Form(0, (4,) * 6))) == "dim 0 along col in segments 6 x 4"
