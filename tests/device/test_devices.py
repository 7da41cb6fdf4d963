"""Which device a rank takes, and collectives of ranks that share one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from axonn.device.devices import are_shared, device_type, local_rank, peak_bytes, rank_device
from axonn.device.local_rank import LOCAL_RANKS
from axonn.distributed.collectives import StagedCollectives
from axonn.distributed.launch import LAUNCHERS, rank_environment
from axonn.distributed.runtime import connect
from axonn.distributed.transport.mpi import MPITransport
from axonn.distributed.transport.staging import StagedPath
from axonn.errors import ConfigError
from axonn.grid import AXES, ProcessGrid
from tests.helpers.comparing import check_every_rank
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import Case, Outcome, train


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 0),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "3", "LOCAL_RANK": "1"}, 3),
        ({"MPI_LOCALRANKID": "2"}, 2),
        ({"SLURM_LOCALID": "5"}, 5),
        ({"LOCAL_RANK": "1"}, 1),
    ],
)
def test_launchers_say_which_rank_of_the_node_it_is(environment: Mapping[str, str], expected: int) -> None:
    assert local_rank(environment) == expected


def test_ranks_of_a_node_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken = [rank_device("auto", {"SLURM_LOCALID": str(i)}) for i in range(4)]
    assert taken == [torch.device("cuda", i) for i in (0, 1, 0, 1)]
    assert rank_device("cpu", {"SLURM_LOCALID": "1"}) == torch.device("cpu")


def test_asking_for_a_gpu_where_there_is_none_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_type("auto") == "cpu"
    with pytest.raises(ConfigError, match="take device 'cpu'"):
        device_type("cuda")
    with pytest.raises(ConfigError, match="unknown device 'gpu'; known are auto, cpu, cuda"):
        device_type("gpu")


def test_ranks_share_a_device_when_two_have_the_same_one() -> None:
    assert are_shared(["a/1", "a/2", "a/1"])
    assert not are_shared(["a/1", "a/2", "b/1"])


def test_ranks_do_not_take_the_place_that_an_outer_launcher_gave_this_process() -> None:
    outer = {name: "3" for names in LAUNCHERS for name in names} | dict.fromkeys(LOCAL_RANKS, "3")
    assert not outer.keys() & rank_environment(outer).keys()


def test_memory_of_a_process_without_gpu_is_what_is_resident() -> None:
    assert peak_bytes(torch.device("cpu")) > 10_000_000


STAGED = Case(data=2, inter=2, col=2, microbatches=4, sub_shards=2, steps=3, clip=0.05)


def train_through_host_memory(comm: Any, case: Case) -> Outcome:
    """A job of the rank pool: everything takes the way that it takes where ranks share a GPU."""
    with connect(case.grid, comm=comm) as runtime:
        transport = MPITransport(comm, path=StagedPath(torch.device("cpu")))
        try:
            return train(case, runtime.rank, transport, StagedCollectives(case.grid, runtime.rank))
        finally:
            transport.close()


def test_training_through_host_memory_equals_serial_training_on_every_rank(pool: RankPool) -> None:
    check_every_rank(STAGED, pool.run(train_through_host_memory, STAGED, ranks=STAGED.grid.size))


def _staged(comm: Any, grid: ProcessGrid) -> list[list[float]]:
    with connect(grid, comm=comm) as runtime:
        return _collect(StagedCollectives(grid, runtime.rank), runtime.rank)


def _collect(collectives: StagedCollectives, rank: int) -> list[list[float]]:
    world, pair = collectives.axis_group(AXES), collectives.axis_group(["col"])
    summed = torch.full((2, 3), float(rank)).t().contiguous()
    largest = torch.tensor([float(rank), -float(rank)])
    gathered = torch.empty(2, 2, dtype=torch.bfloat16)
    works = [
        collectives.all_reduce(summed, world),
        collectives.all_reduce(largest, pair, "max"),
        collectives.all_gather(gathered, torch.full((2,), float(rank), dtype=torch.bfloat16), pair),
    ]
    before = summed.clone()
    # Until it is waited for, the tensor is its owner's, as memory on a device is.
    assert torch.equal(before, torch.full((3, 2), float(rank)))
    for work in reversed(works):
        work.wait()
        work.wait()
    assert sum(collectives.calls.values()) == 3
    return [summed.flatten().tolist(), largest.tolist(), gathered.float().flatten().tolist()]


def test_collectives_through_host_memory_on_every_rank(pool: RankPool) -> None:
    grid = ProcessGrid(data=2, col=2)
    for rank, (summed, largest, gathered) in enumerate(pool.run(_staged, grid, ranks=4)):
        first = rank // 2 * 2
        assert summed == [6.0] * 6
        assert largest == [first + 1.0, -float(first)]
        assert gathered == [first, first, first + 1.0, first + 1.0]
