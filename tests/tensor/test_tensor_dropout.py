"""Dropout draws from the position in training alone: every grid, sub-shard and recomputation has the serial mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.tensor import Dropout, MultiheadAttention, TensorAxis, TensorContext, attention
from axonn.tensor.counter_random import keep_mask
from tests.helpers.rank_pool import RankPool
from tests.helpers.tensor_layers import cut_along, grids, on_every_rank, part_of
from tests.helpers.training import Case, Outcome, serial_reference, train_in_process, train_over_mpi

SAMPLES = range(100, 103)


def dropped(
    shape: tuple[int, ...] = (3, 40, 50),
    *,
    p: float = 0.3,
    seed: int = 0,
    name: str = "layer",
    step: int = 5,
    samples: Any = SAMPLES,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """What is left of ones on one rank."""
    context = TensorContext.serial(seed=seed)
    with context.positions.at(step, samples):
        return Dropout(p, name=name, context=context)(torch.ones(shape, dtype=dtype))


@settings(max_examples=80)
@given(
    grids,
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["row", "col", None])), max_size=3),
    st.sampled_from([(), ("row", "col")]),
    st.floats(0.05, 0.95),
    st.integers(0, 2**40),
)
def test_every_cut_of_an_activation_draws_its_part_of_the_serial_mask(
    grid: ProcessGrid, sizes: list[tuple[int, TensorAxis | None]], repeated: tuple[TensorAxis, ...], p: float, seed: int
) -> None:
    """Each axis cuts one dim at most; sizes are odd and even."""
    used: set[TensorAxis] = set(repeated)
    shape, cuts = [3], []
    for dim, (parts, axis) in enumerate(sizes, 1):
        mine = None if axis is None or axis in used else axis
        shape.append(parts * (1 if mine is None else grid.extent(mine)))
        if mine is not None:
            used.add(mine)
            cuts.append((dim, mine))
    whole = torch.arange(math.prod(shape), dtype=torch.float64).view(shape) + 1
    context = TensorContext.serial(seed=seed)
    with context.positions.at(5, SAMPLES):
        expected = Dropout(p, name="layer", context=context)(whole)
    lies = tuple(cut for dim, axis in cuts for cut in cut_along(dim, axis, [shape[dim]]))

    def same(context: TensorContext, rank: int) -> bool:
        layer = Dropout(p, name="layer", context=context, cuts=tuple(cuts))
        with context.positions.at(5, SAMPLES):
            y = layer(part_of(whole, lies, grid, rank))
        return torch.equal(y, part_of(expected, lies, grid, rank))

    assert all(on_every_rank(grid, same, seed=seed))


@settings(max_examples=60)
@given(st.data(), st.lists(st.integers(1, 9), max_size=4))
def test_any_box_of_a_mask_is_part_of_the_whole(data: st.DataObject, shape: list[int]) -> None:
    box = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        box.append(slice(start, data.draw(st.integers(start + 1, size))))
    whole = keep_mask([3, 4], 0.5, shape=shape, box=[slice(0, n) for n in shape]).view(2, *shape)
    part = keep_mask([3, 4], 0.5, shape=shape, box=box)
    assert torch.equal(part.view(2, *[b.stop - b.start for b in box]), whole[:, *box])


def test_masks_too_large_to_be_drawn_at_once_have_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [slice(0, 7), slice(0, 5), slice(0, 9)]
    at_once = keep_mask([3], 0.5, shape=(7, 5, 9), box=whole)
    monkeypatch.setattr("axonn.tensor.counter_random.AT_ONCE", 100)
    assert torch.equal(keep_mask([3], 0.5, shape=(7, 5, 9), box=whole), at_once)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_as_many_are_dropped_as_asked_for(p: float) -> None:
    y = dropped((3, 500, 601), p=p)
    kept = y > 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    assert torch.equal(y[~kept], torch.zeros_like(y[~kept]))
    deviation = math.sqrt(p * (1 - p) / y.numel())
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * deviation


def test_neighbours_are_independent() -> None:
    centred = (dropped((3, 500, 601), p=0.5) > 0).double() - 0.5
    for moved in (centred.roll(1, -1), centred.roll(1, -2), centred.roll(2, -1), centred.roll(1, 0)):
        correlation = float((centred * moved).mean()) / 0.25
        assert abs(correlation) < 5 / math.sqrt(centred.numel())


def test_seed_name_step_and_sample_all_matter_and_nothing_else() -> None:
    first = dropped()
    torch.manual_seed(1)
    assert torch.equal(dropped(), first)
    others = [
        dropped(seed=1),
        dropped(name="another"),
        dropped(step=6),
        dropped(samples=range(200, 203)),
        dropped(samples=[100, 101, 102])[[1, 2, 0]],
    ]
    for other in others:
        # Two independent masks agree in 0.58 of the elements.
        assert float((other == first).double().mean()) < 0.6
    # A sample has its mask in whatever row it is, beside whichever others.
    assert torch.equal(dropped((1, 40, 50), samples=[101])[0], first[1])
    assert torch.equal(dropped(samples=[102, 7, 100])[[2, 0]], first[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_has_the_same_mask(dtype: torch.dtype) -> None:
    y = dropped(dtype=dtype)
    assert y.dtype == dtype
    assert torch.equal(y > 0, dropped() > 0)
    assert float(y.max()) == pytest.approx(1 / 0.7, rel=float(torch.finfo(dtype).eps))


def test_nothing_is_dropped_outside_of_training_or_with_probability_zero() -> None:
    context = TensorContext.serial()
    x = torch.ones(3, 4)
    assert Dropout(0.0, name="a", context=context)(x) is x
    assert Dropout(0.5, name="a", context=context).eval()(x) is x


def test_the_gradient_goes_through_the_same_mask_of_which_a_byte_is_kept() -> None:
    context = TensorContext.serial()
    layer = Dropout(0.3, name="layer", context=context)
    x = torch.randn(3, 40, 50, dtype=torch.float64, requires_grad=True)
    saved: list[torch.Tensor] = []
    with (
        context.positions.at(5, SAMPLES),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = layer(x)
    weights = torch.randn_like(y)
    y.backward(weights)
    assert x.grad is not None
    assert torch.equal(x.grad, weights * dropped())
    assert sum(t.numel() * t.element_size() for t in saved) == x.numel()


def test_a_recomputation_and_sub_shards_draw_the_same() -> None:
    context = TensorContext.serial()
    layer = Dropout(0.3, name="layer", context=context)
    expected = dropped()

    def sub_shard(first: int, rows: int) -> torch.Tensor:
        x = torch.ones(rows, 40, 50, dtype=torch.float64, requires_grad=True)
        samples = SAMPLES[first : first + rows]
        with context.positions.at(5, samples):
            y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
        # Another batch's forward comes in between.
        with context.positions.at(6, samples):
            layer(x)
        with context.positions.at(5, samples):
            y.sum().backward()
        assert x.grad is not None
        return x.grad

    found = context.lanes.run([lambda: sub_shard(0, 2), lambda: sub_shard(2, 1)])
    context.lanes.close()
    assert torch.equal(torch.cat(found), expected)


def test_a_position_that_is_unknown_or_of_other_samples_is_an_error() -> None:
    context = TensorContext.serial()
    layer = Dropout(0.3, name="mlp3.dropout", context=context)
    with pytest.raises(ConfigError, match=r"positions\.at"):
        layer(torch.ones(3, 4))
    with (
        context.positions.at(0, range(2)),
        pytest.raises(ConfigError, match=r"mlp3\.dropout gets 3 rows, but 2 samples"),
    ):
        layer(torch.ones(3, 4))


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_probabilities_that_make_no_sense_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        Dropout(p, name="a", context=TensorContext.serial())


def test_the_samples_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="dim 0 are the samples"):
        Dropout(0.1, name="a", context=TensorContext.serial(), cuts=((0, "row"),))


@pytest.mark.parametrize("mask", [None, "causal", "boolean", "added"])
def test_explicit_attention_is_the_fused_one_when_nothing_is_dropped(mask: str | None) -> None:
    context = TensorContext.serial()
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    # So small that of 200 probabilities none is dropped, and the scale is 1.
    rarely = Dropout(1e-12, name="attention", context=context)
    options: dict[str, Any] = {
        None: {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": torch.rand(5, 5) < 0.5, "is_causal": False} | {"attn_mask": torch.eye(5).bool()},
        "added": {"attn_mask": torch.randn(5, 5, dtype=torch.float64), "is_causal": True},
    }[mask]
    with context.positions.at(0, range(2)):
        explicit = attention(q, k, v, dropout=rarely, **options)
    fused = attention(q, k, v, **options)
    assert torch.equal(fused, attention(q, k, v, dropout=rarely.eval(), **options))
    assert float((explicit - fused).abs().max()) < 1e-11


def test_attention_with_dropout_is_the_same_on_every_grid() -> None:
    grid = ProcessGrid(row=2, col=3)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    values = {"in_proj.weight": torch.randn(36, 12), "out_proj.weight": torch.randn(12, 12)}

    def attend(context: TensorContext, rank: int) -> torch.Tensor:
        layer = MultiheadAttention(12, 6, 0.4, False, torch.device("cpu"), torch.float64, context=context, name="a")
        for name, parameter in layer.named_parameters():
            parent = layer.in_proj if name.startswith("in") else layer.out_proj
            cuts = parent.placements["weight"].cuts
            parameter.data.copy_(part_of(values[name].double(), cuts, context.grid, rank))
        with context.positions.at(5, SAMPLES):
            y: torch.Tensor = layer(part_of(x, cut_along(2, "row", [12]), context.grid, rank), is_causal=True)
        return y.detach()

    whole = attend(TensorContext.serial(), 0)
    for rank, y in enumerate(on_every_rank(grid, attend)):
        expected = part_of(whole, cut_along(2, "row", [12]), grid, rank)
        assert float((y - expected).abs().max()) < 1e-12 * float(whole.abs().max())


GRIDS: dict[str, dict[str, Any]] = {
    "row x col, sub-shards and recomputation": {"row": 2, "col": 2, "sub_shards": 2, "recompute": 1},
    "data x inter x col": {"data": 2, "inter": 2, "col": 2},
}


def assert_serial(case: Case, outcomes: list[Outcome]) -> None:
    reference = serial_reference(case)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(reference.losses, rel=1e-12, abs=0)
        assert outcome.evaluations == pytest.approx(reference.evaluations, rel=1e-12, abs=0)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_a_gpt_with_dropout_trains_as_a_serial_one_and_is_evaluated_without(grid: dict[str, Any]) -> None:
    """Losses of later steps show the gradients of earlier ones."""
    case = Case(dropout=0.2, steps=3, **grid)
    assert_serial(case, train_in_process(case))
    plain = serial_reference(Case(steps=3))
    with_dropout = serial_reference(case)
    assert with_dropout.evaluations[0] == plain.evaluations[0]
    assert abs(with_dropout.losses[0] - plain.losses[0]) > 1e-4


def test_a_gpt_with_dropout_over_gloo(pool: RankPool) -> None:
    case = Case(data=2, row=2, col=2, dropout=0.2, steps=3, sub_shards=2, recompute=1)
    assert_serial(case, pool.run(train_over_mpi, case, ranks=case.grid.size))
