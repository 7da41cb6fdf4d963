"""Collectives over groups of the grid: what arrives where, and what is counted of them."""

from __future__ import annotations

from collections import Counter

import torch

from axonn.distributed.collectives import Call, Collectives, SerialCollectives
from axonn.grid import AXES, Axis, ProcessGrid
from tests.helpers.every_rank import GRID, RunsRanks

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


def count_calls(collectives: Collectives) -> Counter[Call]:
    data, world = collectives.axis_group(["data"]), collectives.axis_group(AXES)
    for _ in range(3):
        collectives.all_reduce(torch.zeros(2, 3), data).wait()
    collectives.all_reduce(torch.zeros(7, dtype=torch.float64), world, "max").wait()
    collectives.all_gather(torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.bfloat16), data).wait()
    ends = collectives.stage_group((0, 3))
    if ends is not None:
        collectives.all_reduce(torch.zeros(4), ends).wait()
    collectives.all_reduce(torch.zeros(4), collectives.axis_group(["row"])).wait()
    return collectives.calls


def test_every_call_is_counted_with_its_ranks_axes_size_and_type(run_ranks: RunsRanks) -> None:
    """And nothing that needs no other rank."""
    for rank, calls in enumerate(run_ranks(count_calls)):
        replicas = GRID.group(rank, ["data"])
        expected = {
            Call("all-reduce sum", ("data",), replicas, 6, "float32", 4): 3,
            Call("all-reduce max", AXES, tuple(range(8)), 7, "float64", 8): 1,
            Call("all-gather", ("data",), replicas, 5, "bfloat16", 2): 1,
        }
        if rank % 4 in (0, 3):
            expected[Call("all-reduce sum", ("inter",), (rank // 4 * 4, rank // 4 * 4 + 3), 4, "float32", 4)] = 1
        assert calls == expected


def test_a_single_rank_reduces_and_counts_nothing() -> None:
    collectives = SerialCollectives(ProcessGrid(), 0)
    tensor = torch.tensor([3.0])
    collectives.all_reduce(tensor, collectives.axis_group(AXES)).wait()
    gathered = torch.zeros(1, 1)
    collectives.all_gather(gathered, tensor, collectives.axis_group(["row"])).wait()
    assert tensor.item() == gathered.item() == 3.0
    assert not collectives.calls
