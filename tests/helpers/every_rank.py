"""A body that runs with the collectives of each kind, on every rank of one grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mpi4py import MPI

from axonn.distributed.collectives import Collectives
from axonn.distributed.runtime import connect
from axonn.distributed.transport import InProcessCollectives, InProcessWorld
from axonn.grid import ProcessGrid
from tests.helpers.rank_pool import RankPool

GRID = ProcessGrid(data=2, inter=4)
Body = Callable[[Collectives], Any]
RunsRanks = Callable[[Body], list[Any]]


def body_over_mpi(comm: MPI.Intracomm, body: Body) -> Any:
    """A job of the rank pool."""
    with connect(GRID, comm=comm) as runtime:
        return body(runtime.collectives)


@pytest.fixture(params=["gloo", "in-process", "in-process, random order"])
def run_ranks(request: pytest.FixtureRequest) -> RunsRanks:
    """Calls `body(collectives)` on every rank of the grid."""
    if request.param == "gloo":
        pool: RankPool = request.getfixturevalue("pool")
        return lambda body: pool.run(body_over_mpi, body, ranks=GRID.size)

    def run(body: Body) -> list[Any]:
        world = InProcessWorld(GRID.size, order_seed=3 if "random" in request.param else None)
        return world.run(lambda rank: body(InProcessCollectives(world, GRID, rank)))

    return run
