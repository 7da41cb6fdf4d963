"""Decisions between ranks: every transport keeps the same promises, and counts them apart from messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from axonn.distributed.runtime import connect
from axonn.distributed.transport import (
    Address,
    Decision,
    Decisions,
    InProcessTransport,
    InProcessWorld,
    SentMessage,
    Transport,
)
from axonn.distributed.transport.base import DECISION_BYTES
from axonn.distributed.transport.message_header import open_decision, pack_decision
from axonn.distributed.transport.mpi import MPITransport
from axonn.distributed.transport.torch_distributed import Channel, TorchTransport, channels_of
from axonn.errors import DeadlockError, TransportError
from axonn.grid import AXES, ProcessGrid
from axonn.schedules import Direction
from tests.helpers.rank_pool import RankPool
from tests.helpers.transports import TRANSPORTS, compute_until, edge, own_threads, receive, run_over

GRID = ProcessGrid(inter=2, row=2)
"""Ranks 0 and 1 are a stage, 2 and 3 the next one."""
RunsRanks = Callable[..., list[Any]]


@pytest.fixture(params=TRANSPORTS)
def run_ranks(request: pytest.FixtureRequest, pool: RankPool) -> RunsRanks:
    """Calls `body(transport, *args)` on every rank of GRID."""
    return lambda body, *args: run_over(request.param, pool, body, GRID.size, *args, grid=GRID)


def hear(transport: Transport, count: int) -> list[Decision]:
    """The next `count` decisions; no message may arrive meanwhile."""
    heard: list[Decision] = []
    while len(heard) < count:
        assert transport.wait() == []
        heard += transport.poll_decisions()
    return heard


def decision(number: int) -> Decision:
    return number % 4, -number, number << 40


def tells(transport: Transport, count: int) -> list[Decision]:
    """In two batches, the second of which is told before it is expected."""
    leader = transport.rank & ~1
    if transport.rank == leader:
        for i in range(2 * count):
            transport.send_decision(leader + 1, decision(i))
        transport.flush()
        return []
    heard = []
    for _ in range(2):
        transport.expect_decisions(leader, count)
        heard += hear(transport, count)
        assert transport.poll_decisions() == []
    return heard


def test_decisions_come_in_the_order_in_which_they_were_told(run_ranks: RunsRanks) -> None:
    outcomes = run_ranks(tells, 200)
    assert outcomes == [[], [decision(i) for i in range(400)]] * 2


def tells_amid_messages(
    transport: Transport, count: int
) -> tuple[list[Decision], list[int], Decisions, list[SentMessage]]:
    """Each leader tells its neighbour; each rank sends to its counterpart, the last decision and message coming last.

    A rank that waits is woken by either.
    """
    stage, member = divmod(transport.rank, 2)
    peer = 2 * (1 - stage) + member
    way = Direction(stage)
    transport.expect(edge(peer, Direction(1 - stage), (3,)), count)
    if member:
        transport.expect_decisions(2 * stage, count)
    for i in range(count):
        if not member:
            transport.send_decision(2 * stage + 1, decision(i))
        transport.send(peer, Address(way, 0, i), (torch.full((3,), float(i), dtype=torch.float64),))
    heard: list[Decision] = []
    messages: list[int] = []
    while len(heard) < count * member or len(messages) < count:
        found = transport.wait()
        told = transport.poll_decisions()
        assert found or told
        heard += told
        messages += [m.address.microbatch for m in found]
        assert all(m.tensors[0].tolist() == [m.address.microbatch] * 3 for m in found)
    transport.flush()
    return heard, messages, transport.decisions, transport.calls


def test_decisions_and_messages_leave_each_other_alone_and_are_counted_apart(run_ranks: RunsRanks) -> None:
    count = 40
    for rank, (heard, messages, decisions, calls) in enumerate(run_ranks(tells_amid_messages, count)):
        stage, member = divmod(rank, 2)
        assert heard == [decision(i) for i in range(count * member)]
        assert messages == list(range(count))
        told = 0 if member else count
        assert decisions == Decisions(messages=told, bytes=told * DECISION_BYTES)
        assert calls == {SentMessage(2 * (1 - stage) + member, Direction(stage), elements=3, bytes=24): count}


def tells_one_who_listens_to_messages(transport: Transport) -> list[int]:
    """Decisions that are not expected yet neither arrive nor keep messages from arriving."""
    if transport.rank == 2:
        transport.send_decision(3, decision(1))
        transport.flush()
    elif transport.rank == 1:
        transport.send(3, Address(Direction.FORWARD, 0, 8), (torch.zeros(1, dtype=torch.float64),))
        transport.flush()
    elif transport.rank == 3:
        transport.expect(edge(1, Direction.FORWARD, (1,)), 1)
        (message,) = receive(transport, 1)
        assert transport.poll_decisions() == []
        with pytest.raises(TransportError, match="rank 3 waits for a message, but none is expected"):
            transport.wait()
        transport.expect_decisions(2, 1)
        assert hear(transport, 1) == [decision(1)]
        return [message.address.microbatch]
    return []


def test_a_decision_that_is_not_expected_yet_waits(run_ranks: RunsRanks) -> None:
    assert run_ranks(tells_one_who_listens_to_messages) == [[], [], [], [8]]


def expects_twice(transport: Transport) -> str:
    """Nothing is told: a decision that has arrived is expected no more."""
    if transport.rank != 1:
        return ""
    transport.expect_decisions(0, 1)
    with pytest.raises(TransportError) as error:
        transport.expect_decisions(0, 1)
    return str(error.value)


def test_expecting_decisions_again_too_early_is_an_error(run_ranks: RunsRanks) -> None:
    assert run_ranks(expects_twice)[1] == "rank 1 still expects decisions from rank 0"


def aborts(transport: Transport) -> set[int]:
    """A batch that ends in the middle: rank 1 waits for decisions that never come, rank 3 never listens."""
    if transport.rank == 1:
        transport.expect_decisions(0, 5)
    if transport.rank == 2:
        transport.send_decision(3, decision(0))
    return own_threads(transport)


def test_closing_after_an_aborted_batch_ends_at_once(run_ranks: RunsRanks) -> None:
    before = run_ranks(own_threads)
    # Only the thread of the transport that is asked has come: those of the aborted ones have ended.
    for earlier, now in zip(before, run_ranks(aborts), strict=True):
        assert len(now - earlier) <= 1
    assert run_ranks(tells, 3)[1] == [decision(i) for i in range(6)]


# --- progress


def has_heard(transport: Transport, count: int) -> bool:
    """A glance at the queue; `poll_decisions` would make progress and prove nothing."""
    if isinstance(transport, MPITransport):
        return len(transport._decisions.arrived) == count
    assert isinstance(transport, TorchTransport)
    return len(transport._decision_receivers[0].arrived) == count


def computes_while_it_is_told(comm: MPI.Intracomm, name: Any, flag: str) -> list[Decision]:
    """Neither rank 0, which tells, nor rank 1 calls its transport again until rank 1 has been told."""
    with connect(GRID, comm=comm, transport=name) as runtime:
        transport = runtime.transport
        assert transport is not None
        if runtime.rank == 1:
            transport.expect_decisions(0, 3)
        comm.Barrier()
        told: list[Decision] = []
        if runtime.rank == 0:
            for i in range(3):
                transport.send_decision(1, decision(i))
            assert compute_until(Path(flag).exists)
        elif runtime.rank == 1:
            assert compute_until(lambda: has_heard(transport, 3))
            Path(flag).touch()
            told = transport.poll_decisions()
        comm.Barrier()
        transport.flush()
    return told


@pytest.mark.parametrize("name", ["mpi", "torch"])
def test_a_rank_is_told_while_it_computes(name: str, pool: RankPool, tmp_path: Path) -> None:
    told = pool.run(computes_while_it_is_told, name, str(tmp_path / "told"), ranks=GRID.size)
    assert told == [[], [decision(i) for i in range(3)], [], []]


# --- channels of torch.distributed


@given(
    st.builds(
        ProcessGrid,
        data=st.integers(1, 2),
        inter=st.integers(1, 3),
        row=st.integers(1, 3),
        col=st.integers(1, 2),
        order=st.permutations(AXES).map(tuple),
    )
)
def test_every_stage_finds_its_channels(grid: ProcessGrid) -> None:
    found = [channel for channel in channels_of(grid) if channel.direction is None]
    expected = set()
    for rank in range(grid.size):
        here = grid.coordinates(rank)
        leader = grid.rank(data=here.data, inter=here.inter)
        if rank != leader and grid.inter > 1:
            expected.add(Channel(leader, rank, None))
    assert set(found) == expected
    assert len(found) == len(expected)


def strangers(transport: Transport) -> list[str]:
    told = []
    peer = 3 - transport.rank
    for call in (lambda: transport.send_decision(peer, decision(0)), lambda: transport.expect_decisions(peer, 1)):
        with pytest.raises(TransportError) as error:
            call()
        told.append(str(error.value))
    return told


def test_only_ranks_of_a_stage_have_channels(pool: RankPool) -> None:
    for rank, told in enumerate(run_over("torch", pool, strangers, GRID.size, grid=GRID)):
        assert told == [f"rank {rank} has no channel for decisions {way} {3 - rank}" for way in ("to", "from")]


# --- in process, and packed


def test_a_deadlock_says_who_waits_to_be_told() -> None:
    world = InProcessWorld(2)

    def body(rank: int) -> None:
        if rank == 1:
            transport = InProcessTransport(world, rank)
            transport.expect_decisions(0, 4)
            transport.wait()

    with pytest.raises(DeadlockError, match=r"rank 1 waits for messages \(4 decisions from 0\)"):
        world.run(body)


@given(st.tuples(*[st.integers(-(1 << 63), (1 << 63) - 1)] * 3))
def test_a_packed_decision_is_read_as_it_was(numbers: Decision) -> None:
    packed = pack_decision(numbers)
    assert len(packed) == DECISION_BYTES
    assert open_decision(packed) == numbers
