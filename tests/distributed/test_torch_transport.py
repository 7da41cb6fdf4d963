"""Messages over torch.distributed: its channels, progress beside a computation, and what happens when a rank leaves."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI
from torch.distributed import PrefixStore

from axonn.distributed.runtime import connect
from axonn.distributed.transport import Address, Message
from axonn.distributed.transport.torch_distributed import Channel, TorchTransport, channels_of
from axonn.errors import TransportError
from axonn.grid import AXES, ProcessGrid
from axonn.schedules import Direction
from axonn.schedules.layout import ChunkLayout
from tests.helpers.rank_pool import RankPool
from tests.helpers.transports import compute_until, edge, receive

# --- channels


@given(
    st.builds(ProcessGrid, data=st.integers(1, 3), inter=st.integers(1, 5), order=st.permutations(AXES).map(tuple)),
    st.integers(1, 4),
    st.sampled_from(["loop", "v"]),
)
def test_every_layout_finds_its_channels(grid: ProcessGrid, chunks: int, placement: str) -> None:
    channels = channels_of(grid)
    assert len(channels) == len(set(channels))
    layout = ChunkLayout(stages=grid.inter, chunks=chunks, placement=placement)  # type: ignore[arg-type]
    for rank in range(grid.size):
        pipeline = grid.group(rank, ["inter"])
        stage = grid.coordinates(rank).inter
        for chunk in range(chunks):
            for direction in Direction:
                target = layout.target(stage, chunk, direction)
                if target is not None and target[0] != stage:
                    assert Channel(rank, pipeline[target[0]], direction) in channels
    for source, target, _ in channels:
        assert source != target
        assert target in grid.group(source, ["inter"])


def asks_a_stranger(comm: MPI.Intracomm) -> list[str]:
    """Two pipelines of two stages: ranks 0 and 1, ranks 2 and 3."""
    told = []
    with connect(ProcessGrid(data=2, inter=2), comm=comm, transport="torch") as runtime:
        assert runtime.transport is not None
        for call in (
            lambda: runtime.transport.send(3 - runtime.rank, Address(Direction.FORWARD, 0, 0), ()),
            lambda: runtime.transport.expect(edge(3 - runtime.rank, Direction.BACKWARD, (1,)), 1),
        ):
            with pytest.raises(TransportError) as error:
                call()
            told.append(str(error.value))
    return told


def test_only_neighbours_have_channels(pool: RankPool) -> None:
    for rank, told in enumerate(pool.run(asks_a_stranger, ranks=4)):
        assert told == [
            f"rank {rank} has no forward channel to {3 - rank}",
            f"rank {rank} has no backward channel from {3 - rank}",
        ]


def two_at_once(comm: MPI.Intracomm) -> list[int]:
    """A second transport, with a single channel, beside the one of the job."""
    rank = comm.Get_rank()
    with connect(ProcessGrid(inter=2), comm=comm, transport="torch") as runtime:
        assert runtime.transport is not None
        keys = PrefixStore("second", dist.distributed_c10d._get_default_store())
        channels = [Channel(0, 1, Direction.FORWARD)]
        second = TorchTransport(runtime.collectives.grid, rank, store=keys, channels=channels)
        found = []
        for transport, number in ((runtime.transport, 1), (second, 2)):
            if rank == 0:
                transport.send(1, Address(Direction.FORWARD, 0, number), (torch.zeros(1, dtype=torch.float64),))
        for transport in (second, runtime.transport):
            if rank == 1:
                transport.expect(edge(0, Direction.FORWARD, (1,)), 1)
                found += [m.address.microbatch for m in receive(transport, 1)]
            transport.flush()
        second.close()
    return found


def test_two_transports_do_not_hear_each_other(pool: RankPool) -> None:
    assert pool.run(two_at_once, ranks=2) == [[], [2, 1]]


# --- progress


def computes_while_messages_travel(comm: MPI.Intracomm, flag: str) -> list[int]:
    """Rank 0 sends and computes, rank 1 computes; neither calls its transport again until rank 1 has the messages."""
    with connect(ProcessGrid(inter=2), comm=comm, transport="torch") as runtime:
        transport = runtime.transport
        assert isinstance(transport, TorchTransport)
        count = 3
        if runtime.rank == 1:
            transport.expect(edge(0, Direction.FORWARD, (1 << 20,)), count)
        comm.Barrier()
        found = []
        if runtime.rank == 0:
            for i in range(count):
                transport.send(1, Address(Direction.FORWARD, 0, i), (torch.ones(1 << 20, dtype=torch.float64),))
            compute_until(Path(flag).exists)
        else:
            receiver = transport._incoming[0, Direction.FORWARD]
            compute_until(lambda: len(receiver.arrived) == count)
            Path(flag).touch()
            found = [m.address.microbatch for m in transport.poll()]
        comm.Barrier()
        transport.flush()
    return found


def test_messages_sent_before_a_long_computation_have_arrived_when_that_ends(pool: RankPool, tmp_path: Path) -> None:
    found = pool.run(computes_while_messages_travel, str(tmp_path / "arrived"), ranks=2)
    assert found == [[], [0, 1, 2]]


# --- failures


def loses_its_peer(comm: MPI.Intracomm) -> list[str]:
    """Rank 1 leaves without a word; rank 0 waits for it, in every way there is."""
    told = []
    with connect(ProcessGrid(inter=2), comm=comm, transport="torch") as runtime:
        transport = runtime.transport
        assert transport is not None
        if runtime.rank == 1:
            transport.close()
        else:
            transport.expect(edge(1, Direction.BACKWARD, (1,)), 1)
            for call in (transport.wait, transport.poll, transport.flush):
                with pytest.raises(TransportError) as error:
                    call()
                told.append(str(error.value))
            with pytest.raises(TransportError, match="rank 0: torch"):
                transport.send(1, Address(Direction.FORWARD, 0, 0), (torch.zeros(1),))
        comm.Barrier()
    return told


def test_a_rank_that_leaves_is_noticed(pool: RankPool) -> None:
    told = pool.run(loses_its_peer, ranks=2)[0]
    assert len(told) == 3
    assert all(text.startswith("rank 0: torch.distributed failed: ") for text in told)


def aborts_a_batch(comm: MPI.Intracomm) -> list[str]:
    """Every thread waits when the batch is given up: for messages that nobody sends, or that nobody receives."""
    ranks = comm.Get_size()
    with connect(ProcessGrid(inter=ranks), comm=comm, transport="torch") as runtime:
        transport = runtime.transport
        assert transport is not None
        for peer in ((runtime.rank - 1) % ranks, (runtime.rank + 1) % ranks):
            transport.expect(edge(peer, Direction.FORWARD, (1 << 16,)), 5)
            transport.send(peer, Address(Direction.BACKWARD, 0, 0), (torch.zeros(1 << 16),) * 2)
        comm.Barrier()
        before = len(threads())
    return [str(before), *threads()]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("axonn-")]


def test_closing_ends_threads_that_wait(pool: RankPool) -> None:
    assert pool.run(aborts_a_batch, ranks=3) == [["4"]] * 3


class Unlucky(TorchTransport):
    """A message arrives between the end of a wait and the poll that follows it."""

    def poll(self) -> list[Message]:
        receivers = list(self._incoming.values())
        with self._state.changed:
            self._state.changed.wait_for(lambda: self._state.failure or not any(r.left for r in receivers))
        return super().poll()


def waits_unluckily(comm: MPI.Intracomm) -> list[int]:
    with connect(ProcessGrid(inter=2), comm=comm, transport="torch") as runtime:
        transport = runtime.transport
        assert isinstance(transport, TorchTransport)
        transport.__class__ = Unlucky
        transport.expect(edge(1 - runtime.rank, Direction.FORWARD, (1,)), 3)
        for i in range(3):
            transport.send(1 - runtime.rank, Address(Direction.FORWARD, 0, i), (torch.zeros(1, dtype=torch.float64),))
        numbers = [m.address.microbatch for m in transport.wait()]
        transport.flush()
        comm.Barrier()
    return numbers


def test_a_wait_returns_all_that_has_come(pool: RankPool) -> None:
    assert pool.run(waits_unluckily, ranks=2) == [[0, 1, 2]] * 2


@pytest.mark.skipif(dist.is_nccl_available(), reason="this torch has NCCL")
def test_gpu_tensors_without_nccl_are_refused() -> None:
    with pytest.raises(TransportError, match=r"need NCCL, which .* lacks; use MPI$"):
        TorchTransport(ProcessGrid(inter=2), 0, store=dist.HashStore(), device=torch.device("cuda"))
