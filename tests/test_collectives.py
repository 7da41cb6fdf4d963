"""Collectives over groups of the grid: what arrives where, and that the engine issues what it must and no more."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from axonn.collectives import Call, Collectives, SerialCollectives
from axonn.grid import AXES, Axis, ProcessGrid
from tests.every_rank import GRID, RunsRanks
from tests.rank_pool import RankPool
from tests.training import CHUNK, Case, Outcome, train_in_process, train_over_mpi

TIES = [(0, 3), (0, 1), (1, 2), (2, 3), (0, 1, 3)]
AXIS_SETS: list[tuple[Axis, ...]] = [("data",), ("inter",), ("row",), ("data", "inter"), AXES]


def value(rank: int) -> torch.Tensor:
    return torch.tensor([float(2**rank), float(-rank)], dtype=torch.float64)


def reduce_over_everything(collectives: Collectives) -> dict[tuple[str, tuple[int, ...]], list[float]]:
    groups = [collectives.axis_group(axes) for axes in AXIS_SETS]
    # A ring of ties over stages: ranks belong to different numbers of groups.
    groups += [group for stages in TIES if (group := collectives.stage_group(stages)) is not None]
    results = {}
    for operation in ("sum", "max"):
        tensors = [value(collectives.rank) for _ in groups]
        # All of them under way at once.
        works = [collectives.all_reduce(t, g, operation) for t, g in zip(tensors, groups, strict=True)]
        for group, tensor, work in reversed(list(zip(groups, tensors, works, strict=True))):
            work.wait()
            results[operation, group.ranks] = tensor.tolist()
    return results


def test_sum_and_max_on_every_rank_of_every_group(run_ranks: RunsRanks) -> None:
    for rank, results in enumerate(run_ranks(reduce_over_everything)):
        groups = {GRID.group(rank, axes) for axes in AXIS_SETS}
        for stages in TIES:
            if GRID.coordinates(rank).inter in stages:
                groups.add(tuple(GRID.rank(data=rank // 4, inter=stage) for stage in stages))
        assert results.keys() == {(operation, group) for operation in ("sum", "max") for group in groups}
        for (operation, group), result in results.items():
            parts = torch.stack([value(r) for r in group])
            expected = parts.sum(0) if operation == "sum" else parts.amax(0)
            assert result == expected.tolist()


def repeat(collectives: Collectives) -> list[float]:
    world = collectives.axis_group(AXES)
    results = []
    for i in range(5):
        tensor = torch.full((3,), float(i + collectives.rank))
        collectives.all_reduce(tensor, world).wait()
        results.append(float(tensor.mean()))
    return results


def test_one_call_after_the_other_stays_apart(run_ranks: RunsRanks) -> None:
    assert run_ranks(repeat) == [[8 * i + 28.0 for i in range(5)]] * 8


def count_calls(collectives: Collectives) -> list[Call]:
    data, world = collectives.axis_group(["data"]), collectives.axis_group(AXES)
    collectives.all_reduce(torch.zeros(2, 3), data).wait()
    collectives.all_reduce(torch.zeros(7, dtype=torch.float64), world, "max").wait()
    return collectives.calls


def test_every_call_is_counted_with_its_ranks_and_size(run_ranks: RunsRanks) -> None:
    for rank, calls in enumerate(run_ranks(count_calls)):
        assert calls == [
            Call("all-reduce", GRID.group(rank, ["data"]), 6, 4),
            Call("all-reduce", tuple(range(8)), 7, 8),
        ]


def test_a_single_rank_reduces_and_counts_nothing() -> None:
    collectives = SerialCollectives(ProcessGrid(), 0)
    tensor = torch.tensor([3.0])
    collectives.all_reduce(tensor, collectives.axis_group(AXES)).wait()
    assert tensor.item() == 3.0
    assert collectives.calls == []


# --- what the engine must do, and no more


def expected_calls(case: Case, rank: int, outcome: Outcome) -> Counter[Call]:
    """Collectives of an evaluation and a training step, from first principles."""
    grid = case.grid
    here = grid.coordinates(rank)
    size = 8 if case.dtype == "float64" else 4
    everyone = tuple(range(grid.size))
    calls: Counter[Call] = Counter()
    # The loss of the evaluation and that of the training step, each a float64.
    calls[Call("all-reduce", everyone, 1, 8)] += 2
    if grid.data > 1:
        elements = sum(p.numel() for p in outcome.parameters.values())
        for start in range(0, elements, CHUNK):
            calls[Call("all-reduce", grid.group(rank, ["data"]), min(CHUNK, elements - start), size)] += 1
    if case.tied and here.inter in (0, grid.inter - 1) and grid.inter > 1:
        ends = grid.rank(data=here.data, inter=0), grid.rank(data=here.data, inter=grid.inter - 1)
        calls[Call("all-reduce", ends, case.model.vocab * case.model.hidden, size)] += 1
    return calls


CASES = [
    Case(steps=2, data=4, tied=True),
    Case(steps=2, inter=2, microbatches=3),
    Case(steps=2, data=2, microbatches=3, dtype="float32"),
    Case(steps=2, data=2, inter=4, microbatches=3, tied=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.grid))
@pytest.mark.parametrize("transport", ["gloo", "in-process"])
def test_the_engine_issues_just_the_collectives_it_needs(case: Case, transport: str, pool: RankPool) -> None:
    """However many microbatches: the gradients of a batch are reduced once."""
    in_process = transport == "in-process"
    outcomes = train_in_process(case) if in_process else pool.run(train_over_mpi, case, ranks=case.grid.size)
    for rank, outcome in enumerate(outcomes):
        assert Counter(outcome.calls) == expected_calls(case, rank, outcome)
