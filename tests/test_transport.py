"""Messages between ranks: the same promises over MPI and in one process, and what happens when a rank fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from axonn.collectives import Collectives
from axonn.errors import DeadlockError, GridError, LaunchError, TransportError
from axonn.grid import AXES, ProcessGrid
from axonn.runtime import connect, launched_as
from axonn.schedules import Direction
from axonn.trace import SpanKind, SpanRecorder
from axonn.transport import Address, Edge, InProcessCollectives, InProcessTransport, InProcessWorld, Message, Transport
from axonn.transport.mpi import MPITransport
from tests.rank_pool import RankPool

Body = Callable[..., Any]
RunsRanks = Callable[..., list[Any]]
GIVE_UP_S = 60.0
"""Only ever reached by a test that fails."""


def body_over_mpi(comm: MPI.Intracomm, body: Body, *args: Any) -> Any:
    """A job of the rank pool."""
    transport = MPITransport(comm)
    try:
        return body(transport, *args)
    finally:
        transport.close()


@pytest.fixture(params=["mpi", "in-process", "in-process, random order"])
def run_ranks(request: pytest.FixtureRequest) -> RunsRanks:
    """Calls `body(transport, *args)` on every rank."""
    if request.param == "mpi":
        pool: RankPool = request.getfixturevalue("pool")
        return lambda body, ranks, *args: pool.run(body_over_mpi, body, *args, ranks=ranks)

    def run(body: Body, ranks: int, *args: Any) -> list[Any]:
        world = InProcessWorld(ranks, order_seed=3 if "random" in request.param else None)
        return world.run(lambda rank: body(InProcessTransport(world, rank), *args))

    return run


def edge(peer: int, direction: Direction, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Edge:
    return Edge(peer=peer, direction=direction, shape=shape, dtype=dtype, device=torch.device("cpu"))


def receive(transport: Transport, count: int) -> list[Message]:
    messages: list[Message] = []
    while len(messages) < count:
        messages += transport.wait()
    return messages


# --- order and content

SHAPES = {Direction.FORWARD: (50, 40), Direction.BACKWARD: (3,)}


def swap_both_ways(transport: Transport, count: int) -> list[tuple[Address, tuple[int, ...], float]]:
    """With two stages previous and next are the same peer: both send in both directions, in different orders."""
    peer = 1 - transport.rank
    for direction, shape in SHAPES.items():
        transport.expect(edge(peer, direction, shape), count)
    for i in range(count):
        for direction in sorted(Direction, reverse=transport.rank == 1):
            value = 1000 * transport.rank + 100 * direction + i
            # Microbatches need not be sent in the order of their numbers.
            tensor = torch.full(SHAPES[direction], value, dtype=torch.float64)
            transport.send(peer, Address(direction, 0, (7 * i) % count), tensor)
    messages = receive(transport, 2 * count)
    transport.flush()
    assert transport.poll() == []
    return [(m.address, tuple(m.tensor.shape), float(m.tensor.mean())) for m in messages]


def test_each_direction_keeps_its_order_with_a_single_peer(run_ranks: RunsRanks) -> None:
    count = 30
    for rank, messages in enumerate(run_ranks(swap_both_ways, 2, count)):
        for direction in Direction:
            mine = [m for m in messages if m[0].direction == direction]
            assert [address.microbatch for address, *_ in mine] == [(7 * i) % count for i in range(count)]
            assert {shape for _, shape, _ in mine} == {SHAPES[direction]}
            assert [value for *_, value in mine] == [1000 * (1 - rank) + 100 * direction + i for i in range(count)]


def address_round_trip(transport: Transport, addresses: list[Address]) -> list[Address]:
    if transport.rank == 0:
        for address in addresses:
            transport.send(1, address, torch.zeros(2, dtype=torch.float64))
        transport.flush()
        return []
    transport.expect(edge(0, Direction.FORWARD, (2,)), len(addresses))
    return [m.address for m in receive(transport, len(addresses))]


def test_addresses_arrive_as_they_were_sent(run_ranks: RunsRanks) -> None:
    """Tags of MPI hold them all, up to 16384 microbatches."""
    numbers = [(0, 0, 0), (63, 0, 3), (0, 16383, 0), (63, 16383, 3), (1, 2, 3)]
    addresses = [Address(Direction.FORWARD, chunk, microbatch, tensor) for chunk, microbatch, tensor in numbers]
    assert run_ranks(address_round_trip, 2, addresses)[1] == addresses


def send_types(transport: Transport, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    received = []
    for tensor in tensors:
        if transport.rank == 0:
            transport.send(1, Address(Direction.FORWARD, 0, 0), tensor)
            transport.flush()
        else:
            transport.expect(edge(0, Direction.FORWARD, tuple(tensor.shape), tensor.dtype), 1)
            received += [m.tensor for m in receive(transport, 1)]
    return received


def test_every_type_arrives_bit_by_bit(run_ranks: RunsRanks) -> None:
    values = torch.tensor([[1.0, -0.0, 3.14159], [float("nan"), float("inf"), 1e-7]])
    tensors = [values.to(t) for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
    tensors.append(torch.tensor([2**62, -1]))
    received = run_ranks(send_types, 2, tensors)[1]
    for sent, found in zip(tensors, received, strict=True):
        assert found.dtype == sent.dtype
        assert found.shape == sent.shape
        assert torch.equal(found.view(torch.uint8), sent.view(torch.uint8))


def keep_all(transport: Transport, count: int) -> tuple[int, list[float]]:
    if transport.rank == 0:
        buffer = torch.zeros(5000, dtype=torch.float64)
        for i in range(count):
            transport.send(1, Address(Direction.FORWARD, 0, i), buffer.fill_(i))
            transport.flush()  # After this the buffer is ours again.
        return 0, []
    transport.expect(edge(0, Direction.FORWARD, (5000,)), count)
    messages = receive(transport, count)
    return len({m.tensor.data_ptr() for m in messages}), [float(m.tensor.mean()) for m in messages]


def test_the_receiver_owns_what_it_gets(run_ranks: RunsRanks) -> None:
    assert run_ranks(keep_all, 2, 12)[1] == (12, [float(i) for i in range(12)])


def large_both_ways(transport: Transport) -> float:
    peer = 1 - transport.rank
    size = 1 << 20
    transport.expect(edge(peer, Direction.FORWARD, (size,)), 2)
    for i in range(2):
        tensor = torch.full((size,), transport.rank, dtype=torch.float64)
        transport.send(peer, Address(Direction.FORWARD, 0, i), tensor)
    total = sum(float(m.tensor.mean()) for m in receive(transport, 2))
    transport.flush()
    return total


def test_large_messages_cross_without_blocking_each_other(run_ranks: RunsRanks) -> None:
    assert run_ranks(large_both_ways, 2) == [2.0, 0.0]


def around_the_ring(transport: Transport, ranks: int) -> list[float]:
    before, after = (transport.rank - 1) % ranks, (transport.rank + 1) % ranks
    transport.expect(edge(before, Direction.FORWARD, (4,)), ranks)
    seen = []
    arrived: list[Message] = []
    value = torch.full((4,), transport.rank, dtype=torch.float64)
    for hop in range(ranks):
        transport.send(after, Address(Direction.FORWARD, 0, hop), value)
        arrived = arrived or transport.wait()
        value = arrived.pop(0).tensor
        seen.append(float(value[0]))
    transport.flush()
    return seen


def test_a_message_goes_around_a_ring(run_ranks: RunsRanks) -> None:
    for rank, seen in enumerate(run_ranks(around_the_ring, 4, 4)):
        assert seen == [(rank - 1 - hop) % 4 for hop in range(4)]


def arrivals(order_seed: int | None) -> list[list[Direction]]:
    world = InProcessWorld(2, order_seed=order_seed)
    outcomes = world.run(lambda rank: swap_both_ways(InProcessTransport(world, rank), 8))
    return [[address.direction for address, *_ in messages] for messages in outcomes]


def test_random_orders_differ_and_repeat() -> None:
    by_seed = [arrivals(seed) for seed in range(6)]
    assert by_seed == [arrivals(seed) for seed in range(6)]
    assert len({str(order) for order in by_seed}) > 1
    assert arrivals(None) == arrivals(None)


# --- what is expected


def two_batches(transport: Transport) -> list[list[int]]:
    if transport.rank == 0:
        for i in range(5):
            transport.send(1, Address(Direction.FORWARD, 0, i), torch.zeros(1, dtype=torch.float64))
        transport.flush()
        return []
    batches = []
    for count in (2, 3):
        transport.expect(edge(0, Direction.FORWARD, (1,)), count)
        batches.append([m.address.microbatch for m in receive(transport, count)])
        assert transport.poll() == []
    return batches


def test_messages_of_the_next_batch_wait_until_they_are_expected(run_ranks: RunsRanks) -> None:
    assert run_ranks(two_batches, 2)[1] == [[0, 1], [2, 3, 4]]


def wait_for_nothing(transport: Transport) -> str:
    with pytest.raises(TransportError) as error:
        transport.wait()
    return str(error.value)


def test_waiting_for_what_nobody_expects_is_an_error(run_ranks: RunsRanks) -> None:
    assert run_ranks(wait_for_nothing, 2)[1] == "rank 1 waits for a message, but none is expected"


def expect_twice(transport: Transport) -> str:
    peer = 1 - transport.rank
    transport.expect(edge(peer, Direction.FORWARD, (1,)), 1)
    with pytest.raises(TransportError) as error:
        transport.expect(edge(peer, Direction.FORWARD, (1,)), 1)
    transport.send(peer, Address(Direction.FORWARD, 0, 0), torch.zeros(1, dtype=torch.float64))
    receive(transport, 1)
    transport.flush()
    return str(error.value)


def test_expecting_again_too_early_is_an_error(run_ranks: RunsRanks) -> None:
    assert run_ranks(expect_twice, 2)[0] == "rank 0 still expects messages from rank 1"


def traced(transport: Transport) -> list[tuple[str, int, int, bool]]:
    transport.spans = SpanRecorder(transport.rank)
    peer = 1 - transport.rank
    transport.expect(edge(peer, Direction.BACKWARD, (1000,)), 2)
    for i in range(2):
        transport.send(peer, Address(Direction.BACKWARD, 0, i), torch.zeros(1000, dtype=torch.float64))
    transport.flush()
    receive(transport, 2)
    return [(s.kind, s.microbatch, s.direction, s.end >= s.start) for s in transport.spans.spans]


def test_each_send_is_one_span(run_ranks: RunsRanks) -> None:
    for spans in run_ranks(traced, 2):
        assert sorted(spans) == [(SpanKind.SEND, i, Direction.BACKWARD, True) for i in range(2)]


# --- progress over MPI


def compute_until(done: Callable[[], bool]) -> bool:
    """Matrix products, which release the interpreter's lock and call no MPI."""
    a = torch.rand(768, 768)
    end = time.monotonic() + GIVE_UP_S
    while time.monotonic() < end:
        a = (a @ a).clamp(0, 1)
        if done():
            return True
    return False


def computes_while_a_message_travels(comm: MPI.Intracomm, flag: str) -> int:
    """Rank 0 sends and computes, rank 1 computes; neither calls MPI again until rank 1 has the message."""
    transport = MPITransport(comm)
    if comm.Get_rank() == 1:
        transport.expect(edge(0, Direction.FORWARD, (1 << 21,)), 1)
    comm.Barrier()
    if comm.Get_rank() == 0:
        transport.send(1, Address(Direction.FORWARD, 0, 5), torch.ones(1 << 21, dtype=torch.float64))
        compute_until(Path(flag).exists)
        found = 0
    else:
        # A glance at the queue calls no MPI; a poll would make progress and prove nothing.
        compute_until(lambda: bool(transport._arrived))
        Path(flag).touch()
        found = len(list(transport._arrived))
        assert [m.address.microbatch for m in transport.poll()] == [5] * found
    comm.Barrier()
    transport.flush()
    transport.close()
    return found


def test_a_message_sent_before_a_long_computation_has_arrived_when_that_ends(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(computes_while_a_message_travels, str(tmp_path / "arrived"), ranks=2) == [0, 1]


class Late(MPITransport):
    """The thread takes the message in right after the first, fruitless poll."""

    polls = 0

    def poll(self) -> list[Message]:
        self.polls += 1
        if self.polls > 1:
            return super().poll()
        while not self._arrived:
            time.sleep(0.001)
        return []


def waits_unluckily(comm: MPI.Intracomm) -> int:
    transport = Late(comm)
    number = 0
    if comm.Get_rank() == 0:
        transport.send(1, Address(Direction.FORWARD, 0, 9), torch.zeros(1, dtype=torch.float64))
        transport.flush()
    else:
        transport.expect(edge(0, Direction.FORWARD, (1,)), 1)
        number = transport.wait()[0].address.microbatch
    comm.Barrier()
    transport.close()
    return number


def test_a_message_that_the_thread_takes_in_just_then_is_not_lost(pool: RankPool) -> None:
    assert pool.run(waits_unluckily, ranks=2) == [0, 9]


# --- failures


def test_a_deadlock_in_process_says_who_waits_for_what() -> None:
    world = InProcessWorld(3)
    grid = ProcessGrid(data=3)

    def body(rank: int) -> None:
        if rank == 0:
            transport = InProcessTransport(world, rank)
            transport.expect(edge(2, Direction.BACKWARD, (1,)), 4)
            transport.wait()
        elif rank == 1:
            collectives = InProcessCollectives(world, grid, rank)
            collectives.all_reduce(torch.zeros(1), collectives.axis_group(AXES)).wait()

    with pytest.raises(DeadlockError) as error:
        world.run(body)
    assert "rank 0 waits for messages (4 backward from 2)" in str(error.value)
    assert "rank 1 waits for all-reduce 0 of ranks (0, 1, 2)" in str(error.value)
    assert "rank 2" not in str(error.value)


def test_an_exception_in_process_surfaces_though_others_wait() -> None:
    world = InProcessWorld(3)

    def body(rank: int) -> None:
        if rank == 1:
            raise ValueError("rank 1 has had enough")
        transport = InProcessTransport(world, rank)
        transport.expect(edge(1, Direction.FORWARD, (1,)), 1)
        transport.wait()

    with pytest.raises(ValueError, match="rank 1 has had enough"):
        world.run(body)
    assert not [t for t in threading.enumerate() if t.name.startswith("rank-")]


def fails_on_one_rank(comm: MPI.Intracomm) -> None:
    with connect(ProcessGrid(data=1, inter=2), comm=comm) as runtime:
        assert runtime.transport is not None
        if comm.Get_rank() == 1:
            raise ValueError("rank 1 has had enough")
        runtime.transport.expect(edge(1, Direction.BACKWARD, (1,)), 1)
        runtime.transport.wait()


def test_an_exception_over_mpi_surfaces_though_others_wait() -> None:
    ranks = RankPool(2)
    try:
        with pytest.raises(AssertionError, match=r"rank 1:\n(.*\n)*ValueError: rank 1 has had enough"):
            ranks.run(fails_on_one_rank, ranks=2)
        assert ranks.run(rank_of, ranks=2) == [0, 1]
    finally:
        ranks.stop()


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


def joins(comm: MPI.Intracomm) -> tuple[int, float, int]:
    with connect(ProcessGrid(inter=2, data=2), comm=comm) as runtime:
        runtime.barrier()
        total = torch.ones(1)
        collectives: Collectives = runtime.collectives
        collectives.all_reduce(total, collectives.axis_group(AXES)).wait()
        return runtime.rank, runtime.clock_offset, int(total)


def test_ranks_join_and_agree_on_a_clock(pool: RankPool) -> None:
    answers = pool.run(joins, ranks=4)
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
