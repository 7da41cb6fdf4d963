"""The model optimizers of all ranks of a grid: what they sum, clip, skip and send, and that they stay the same."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from torch import nn

from axonn.config.train_config import PrecisionConfig
from axonn.device.streams import Timeline
from axonn.distributed.collectives import Call, Collectives
from axonn.grid import AXES, Axis, ProcessGrid
from axonn.inter_layer.stage import ParameterSpec
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.optim.model_optimizer import ModelOptimizer
from axonn.perf.timing.memory_model import model_state_bytes, state_bytes
from axonn.placement import Placement
from axonn.spans import SpanKind
from tests.helpers.every_rank import GRID, RunsRanks, body_over_mpi
from tests.helpers.optimizer_cases import (
    CPU,
    Case,
    Outcome,
    optimize_in_process,
    optimize_over_gloo,
    parts_of,
    reference,
    same_bits,
)
from tests.helpers.rank_pool import RankPool
from tests.helpers.shard_cases import assembled

STAGE_ELEMENTS = 35 + 3 + 1 + 41
GRIDS: list[dict[str, Any]] = [
    {"data": 2},
    {"data": 4},
    {"inter": 2, "tied": True},
    {"inter": 3, "tied": True},
    {"data": 2, "inter": 2, "tied": True},
    {"data": 2, "inter": 2},
    {"row": 2},
    {"col": 4},
    {"row": 2, "col": 2},
    {"data": 2, "row": 3, "col": 2},
    {"inter": 2, "row": 3, "col": 1, "tied": True},
    {"data": 2, "inter": 2, "row": 2, "col": 2, "tied": True},
]


def check_agreement(case: Case, outcomes: list[Outcome]) -> list[dict[str, torch.Tensor]]:
    """Replicas and tied copies have the same bits on all ranks, and so has every decision; the whole model per step."""
    whole = []
    for step in range(case.steps):
        parameters = [outcome.parameters[step] for outcome in outcomes]
        whole.append(assembled(parts_of(case, rank, own) for rank, own in enumerate(parameters)))
        assert {outcome.results[step] for outcome in outcomes} == {outcomes[0].results[step]}
        assert all(outcome.progress[step] == outcomes[0].progress[step] for outcome in outcomes)
    return whole


def check_against_torch(case: Case, outcomes: list[Outcome], tolerance: float = 1e-12) -> None:
    expected = reference(case)
    whole = check_agreement(case, outcomes)[-1]
    assert whole.keys() == expected.weights.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor.double(), expected.weights[name], rtol=0, atol=tolerance)
    for outcome in outcomes:
        for result, norm in zip(outcome.results, expected.norms, strict=True):
            assert result.applied
            if case.config.clip_norm is None:
                assert result.gradient_norm is None
            else:
                assert result.gradient_norm == pytest.approx(norm, rel=tolerance)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("placement", ["device", "offloaded"])
@pytest.mark.parametrize("clip", [None, 0.05, 1e6])
def test_every_rank_does_what_torch_does_serially(grid: dict[str, Any], placement: str, clip: float | None) -> None:
    case = Case(**grid, options={"placement": placement, "clip_norm": clip})
    check_against_torch(case, optimize_in_process(case))


@settings(max_examples=15)
@given(
    bsize=st.sampled_from([1, 7, 40, 10_000]),
    k=st.sampled_from([None, 1, 3]),
    grid=st.sampled_from(GRIDS),
    clip=st.sampled_from([None, 0.05]),
)
def test_however_chunks_are_cut(bsize: int, k: int | None, grid: dict[str, Any], clip: float | None) -> None:
    case = Case(**grid, steps=2, options={"bsize": bsize, "k": k, "clip_norm": clip})
    check_against_torch(case, optimize_in_process(case))


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    # Adam's first steps are of size lr whatever the gradient is, so errors stay within a fraction of it.
    [("float32", 1e-5), ("bfloat16 over float32", 1e-2), ("bfloat16", 1e-2), ("float16", 2e-3)],
)
def test_over_gloo(precision: str, tolerance: float, pool: RankPool) -> None:
    for grid in ({"data": 2, "inter": 2}, {"inter": 2, "row": 2, "col": 2}):
        options = {"clip_norm": 0.05, "placement": "offloaded"}
        case = Case(**grid, tied=True, precision=precision, options=options)
        check_against_torch(case, pool.run(optimize_over_gloo, case, ranks=case.grid.size), tolerance)


# --- overflow


@pytest.mark.parametrize(
    "grid",
    [
        {"data": 2},
        {"data": 2, "inter": 2, "tied": True},
        {"inter": 3},
        {"row": 2, "col": 2},
        {"data": 2, "inter": 2, "col": 2, "tied": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_an_overflow_of_one_element_on_one_rank_skips_the_step_on_all(
    grid: dict[str, Any], value: float, clip: float | None
) -> None:
    ranks = ProcessGrid(**{axis: extent for axis, extent in grid.items() if axis != "tied"}).size
    for rank in range(ranks):
        case = Case(**grid, precision="float16", spike=(1, rank, value), options={"clip_norm": clip})
        outcomes = optimize_in_process(case)
        check_agreement(case, outcomes)
        for outcome in outcomes:
            assert [result.applied for result in outcome.results] == [True, False, True, True]
            assert outcome.results[1].gradient_norm is None
            assert [result.loss_scale for result in outcome.results] == [2.0**16, 2.0**16, 2.0**15, 2.0**15]
            assert same_bits(outcome.states[0], outcome.states[1])
            assert same_bits(outcome.parameters[0], outcome.parameters[1])
            assert not same_bits(outcome.parameters[1], outcome.parameters[2])


@pytest.mark.parametrize(("value", "applied"), [(65504.0 / 4 + 16, False), (65504.0 / 4 - 16, True)])
def test_what_might_overflow_in_the_sum_over_replicas_skips_too(value: float, applied: bool) -> None:
    case = Case(data=4, precision="float16", steps=1, spike=(0, 2, value))
    for outcome in optimize_in_process(case):
        assert outcome.results[0].applied is applied
        assert all(tensor.isfinite().all() for tensor in outcome.states[0].values())


# --- collectives


@pytest.mark.parametrize("precision", ["float64", "float16"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_step_issues_just_the_collectives_it_needs(precision: str, clip: float | None, grid: dict[str, Any]) -> None:
    case = Case(**grid, precision=precision, options={"bsize": 16, "k": 2, "clip_norm": clip})
    size = 2 if precision == "float16" else 8

    def reduction(axes: tuple[Axis, ...], ranks: tuple[int, ...], elements: int) -> Call:
        return Call("all-reduce sum", axes, ranks, elements, precision, size)

    for rank, outcome in enumerate(optimize_in_process(case)):
        here = case.grid.coordinates(rank)
        ends = case.tied and here.inter in (0, case.inter - 1)
        elements = STAGE_ELEMENTS
        if case.grid.tensor > 1:
            elements += 96 // case.grid.tensor + 24 // case.col + 12 // case.row
        if ends:
            elements += 24 // case.grid.tensor
        assert elements == sum(tensor.numel() for tensor in outcome.parameters[0].values())
        expected: Counter[Call] = Counter()
        if ends:
            holders = tuple(
                case.grid.rank(data=here.data, inter=stage, row=here.row, col=here.col) for stage in (0, case.inter - 1)
            )
            expected[reduction(("inter",), holders, 24 // case.grid.tensor)] += 1
        if precision == "float16":
            expected[Call("all-reduce max", AXES, tuple(range(case.grid.size)), 1, "float32", 4)] += 1
        if case.data > 1:
            replicas = case.grid.group(rank, ["data"])
            expected[reduction(("data",), replicas, 32)] += elements // 32
            expected[reduction(("data",), replicas, elements % 32)] += elements % 32 > 0
        axes = [axis for axis in ("inter", "row", "col") if case.grid.extent(axis) > 1]
        if clip is not None and axes:
            sharers = case.grid.group(rank, axes)
            expected[Call("all-reduce sum", tuple(axes), sharers, 268, "int64", 8)] += 1
        assert outcome.calls == +expected


def test_all_reduce_spans_follow_each_other_one_for_each_chunk(pool: RankPool) -> None:
    case = Case(data=2, steps=2, options={"bsize": 16, "k": 1})
    for outcomes in (optimize_in_process(case), pool.run(optimize_over_gloo, case, ranks=2)):
        for outcome in outcomes:
            for step in range(2):
                reductions = [s for s in outcome.spans if s.step == step and s.kind == SpanKind.ALL_REDUCE]
                updates = [s for s in outcome.spans if s.step == step and s.kind == SpanKind.OPTIMIZER]
                assert len(reductions) == len(updates) == 5
                assert all(a.start <= a.end <= b.start for a, b in pairwise(reductions))
                assert all(r.end <= u.start for r, u in zip(reductions, updates, strict=True))


def test_agreeing_on_overflow_is_waiting_for_the_others() -> None:
    """As `axonn.perf.timing.step_times` has it: no all-reduce of gradients has begun yet."""
    for outcome in optimize_in_process(Case(data=2, steps=1, precision="float16", options={"bsize": 16, "k": 1})):
        kinds = [s.kind for s in sorted(outcome.spans, key=lambda s: s.start)]
        assert kinds[0] == SpanKind.IDLE
        assert Counter(kinds) == {SpanKind.IDLE: 1, SpanKind.ALL_REDUCE: 5, SpanKind.OPTIMIZER: 5}


# --- gradient reduction follows the placements


def ones(name: str, tensor: torch.Tensor) -> None:
    tensor.fill_(1.0)


def mixed_optimizer(collectives: Collectives, **options: Any) -> tuple[ModelOptimizer, dict[str, nn.Parameter]]:
    placements = {
        "partial along data": Placement(shape=(5, 2)),
        "complete": Placement(shape=(5, 2), partial=()),
        "partial along both": Placement(shape=(5, 2), partial=("data", "inter")),
        "also along data": Placement(shape=(5, 2)),
        "partial along an axis of one": Placement(shape=(5, 2), partial=("row",)),
    }
    parameters = {name: nn.Parameter(torch.empty(5, 2)) for name in placements}
    specs = [ParameterSpec(name=n, parameter=parameters[n], placement=placements[n]) for n in placements]
    optimizer = ModelOptimizer(
        specs,
        grid=GRID,
        rank=collectives.rank,
        collectives=collectives,
        config=AdamWConfig(**options),
        precision=PrecisionConfig(),
        initialise=ones,
        timeline=Timeline(CPU, None),
    )
    return optimizer, parameters


def reduce_gradients(collectives: Collectives) -> tuple[dict[str, float], Counter[Call]]:
    optimizer, parameters = mixed_optimizer(collectives, bsize=4, k=2)
    for _ in range(2):
        optimizer.zero()
        for parameter in parameters.values():
            (parameter * float(2**collectives.rank)).sum().backward()
        before = collectives.calls.copy()
        optimizer.reduce()
    gradients = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        (gradients[name],) = set(parameter.grad.view(-1).tolist())
    return gradients, collectives.calls - before


def test_gradients_are_summed_along_the_axes_on_which_they_are_partial(run_ranks: RunsRanks) -> None:
    """And forgotten between batches; in chunks that never cross from one set of axes to another."""
    for rank, (gradients, calls) in enumerate(run_ranks(reduce_gradients)):
        replicas = GRID.group(rank, ["data"])
        assert gradients == {
            "partial along data": sum(2.0**r for r in replicas),
            "complete": 2.0**rank,
            "partial along both": 2.0**8 - 1,
            "also along data": sum(2.0**r for r in replicas),
            "partial along an axis of one": 2.0**rank,
        }
        everyone = tuple(range(8))
        sizes = [(replicas, 8), (replicas, 8), (replicas, 4), (everyone, 8), (everyone, 2)]
        assert [(call.ranks, call.elements) for call in calls.elements()] == sizes


def norm_of_gradients(collectives: Collectives) -> float | None:
    optimizer, parameters = mixed_optimizer(collectives, bsize=4, clip_norm=1.0)
    for parameter in parameters.values():
        (parameter * float(2**collectives.rank)).sum().backward()
    return optimizer.step(0).gradient_norm


def test_parameters_that_are_replicated_along_the_pipeline_count_once_in_the_norm(run_ranks: RunsRanks) -> None:
    for rank, norm in enumerate(run_ranks(norm_of_gradients)):
        complete = [2.0 ** (rank // 4 * 4 + stage) for stage in range(4)]
        over_replicas = [float(2**stage + 2 ** (stage + 4)) for stage in range(4)]
        squares = sum(value**2 for value in [*complete, *complete, *over_replicas, *over_replicas, 255.0])
        assert norm == pytest.approx((10 * squares) ** 0.5, rel=1e-6)


# --- when a collective was complete


def completion(collectives: Collectives) -> tuple[float, float | None, float, float]:
    tensor = torch.ones(1000)
    start = time.perf_counter()
    work = collectives.all_reduce(tensor, collectives.axis_group(AXES))
    # Nobody waits for it; this rank might as well compute.
    while work.finished_at is None and time.perf_counter() < start + 60:
        time.sleep(1e-3)
    seen = work.finished_at
    end = time.perf_counter()
    work.wait()
    return start, seen, end, float(tensor.mean())


def completion_over_gloo(comm: MPI.Intracomm) -> tuple[float, float | None, float, float]:
    """A job of the rank pool."""
    return body_over_mpi(comm, completion)  # type: ignore[no-any-return]


def test_gloo_says_when_it_was_done_while_the_rank_did_something_else(pool: RankPool) -> None:
    for start, seen, end, mean in pool.run(completion_over_gloo, ranks=8):
        assert seen is not None
        assert start <= seen <= end
        assert mean == 8.0


# --- memory


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("resident", [1, 2])
def test_a_rank_pays_for_its_parts_alone(half: str, resident: int) -> None:
    phi = STAGE_ELEMENTS + 96 // 4 + 24 // 2 + 12 // 2
    options: dict[str, Any] = {"bsize": 16, "buckets_resident": resident}
    for outcome in optimize_in_process(Case(row=2, col=2, precision=half, steps=1, options=options)):
        assert outcome.memory is not None
        assert outcome.memory.device == model_state_bytes(phi) == 20 * phi
    options["placement"] = "offloaded"
    for outcome in optimize_in_process(Case(row=2, col=2, precision=half, steps=1, options=options)):
        assert outcome.memory is not None
        assert (outcome.memory.parameters, outcome.memory.gradients) == (2 * phi, 2 * phi)
        assert outcome.memory.device == 4 * phi + 16 * resident * 16
        assert outcome.memory.host == state_bytes("float16").streamed * phi
