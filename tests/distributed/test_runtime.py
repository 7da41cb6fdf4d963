"""Joining the ranks of a job, and leaving it: who is who, which transport, and what is left when a rank fails."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI

from axonn.distributed.collectives import Collectives
from axonn.distributed.runtime import TransportName, connect, launched_as
from axonn.errors import GridError, LaunchError, TransportError
from axonn.grid import AXES, ProcessGrid
from axonn.schedules import Direction
from tests.helpers.rank_pool import RankPool
from tests.helpers.transports import edge


def fails_on_one_rank(comm: MPI.Intracomm, transport: TransportName) -> None:
    with connect(ProcessGrid(data=1, inter=2), comm=comm, transport=transport) as runtime:
        assert runtime.transport is not None
        if comm.Get_rank() == 1:
            raise ValueError("rank 1 has had enough")
        runtime.transport.expect(edge(1, Direction.BACKWARD, (1,)), 1)
        runtime.transport.wait()


def test_an_exception_over_mpi_surfaces_though_others_wait() -> None:
    ranks = RankPool(2)
    try:
        with pytest.raises(AssertionError, match=r"rank 1:\n(.*\n)*ValueError: rank 1 has had enough"):
            ranks.run(fails_on_one_rank, "mpi", ranks=2)
        assert ranks.run(rank_of, ranks=2) == [0, 1]
    finally:
        ranks.stop()


def fails_over_torch(comm: MPI.Intracomm) -> str:
    with pytest.raises((ValueError, TransportError)) as error:
        fails_on_one_rank(comm, "torch")
    return str(error.value)


def test_an_exception_over_torch_ends_the_wait_of_the_others(pool: RankPool) -> None:
    first, second = pool.run(fails_over_torch, ranks=2)
    assert first.startswith("rank 0: torch.distributed failed: ")
    assert second == "rank 1 has had enough"


def rank_of(comm: MPI.Intracomm) -> int:
    return comm.Get_rank()


# --- joining


def joins_a_wrong_grid(comm: MPI.Intracomm) -> str:
    with pytest.raises(GridError) as error, connect(ProcessGrid(data=2, inter=2), comm=comm):
        pass
    return str(error.value)


def test_a_grid_that_does_not_fit_the_ranks_is_refused_on_every_rank(pool: RankPool) -> None:
    messages = pool.run(joins_a_wrong_grid, ranks=2)
    assert len(messages) == 2
    assert all("needs 4 ranks, but 2 run; change the grid or start 4 ranks" in message for message in messages)


def joins(comm: MPI.Intracomm, transport: TransportName) -> tuple[int, float, int]:
    with connect(ProcessGrid(inter=2, data=2), comm=comm, transport=transport) as runtime:
        assert type(runtime.transport).__name__ == {"mpi": "MPITransport", "torch": "TorchTransport"}[transport]
        runtime.barrier()
        total = torch.ones(1)
        collectives: Collectives = runtime.collectives
        collectives.all_reduce(total, collectives.axis_group(AXES)).wait()
        return runtime.rank, runtime.clock_offset, int(total)


@pytest.mark.parametrize("transport", ["mpi", "torch"])
def test_ranks_join_and_agree_on_a_clock(transport: TransportName, pool: RankPool) -> None:
    answers = pool.run(joins, transport, ranks=4)
    assert [rank for rank, *_ in answers] == [0, 1, 2, 3]
    assert {total for *_, total in answers} == {4}
    # All ranks run on this machine and read the same clock, so what is found is the error of the method.
    assert answers[0][1] == 0.0
    assert all(abs(offset) < 1.0 for _, offset, _ in answers)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, (0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, (3, 4)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, (5, 6)),
        ({"RANK": "0", "WORLD_SIZE": "8"}, (0, 8)),
        ({"RANK": "2"}, (0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (1, 2)),
    ],
)
def test_the_launchers_environment_says_who_this_is(environment: dict[str, str], found: tuple[int, int]) -> None:
    assert launched_as(environment) == found


def test_a_launcher_that_does_not_belong_to_the_mpi_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with (
        pytest.raises(LaunchError, match="the launcher started 2 ranks, but MPI sees 1"),
        connect(ProcessGrid(data=2)),
    ):
        pass


def test_one_rank_needs_no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    with connect(ProcessGrid()) as runtime:
        assert (runtime.rank, runtime.transport) == (0, None)
        runtime.barrier()
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="2 ranks need MPI, which cannot be loaded"), connect(ProcessGrid(data=2)):
        pass
