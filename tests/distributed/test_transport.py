"""Messages between ranks: every transport keeps the same promises."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axonn.distributed.tensor_spec import TensorSpec
from axonn.distributed.transport import (
    Address,
    InProcessCollectives,
    InProcessTransport,
    InProcessWorld,
    Message,
    MessageEdge,
    Transport,
)
from axonn.distributed.transport.message_header import HEADER_BYTES, open_header, pack_header
from axonn.errors import DeadlockError, TransportError
from axonn.grid import AXES, ProcessGrid
from axonn.schedules import Direction
from axonn.spans import SpanKind, SpanRecorder
from tests.helpers.rank_pool import RankPool
from tests.helpers.transports import TRANSPORTS, edge, edge_of, filled, own_threads, receive, run_over, same_bits

RunsRanks = Callable[..., list[Any]]


@pytest.fixture(params=TRANSPORTS)
def run_ranks(request: pytest.FixtureRequest, pool: RankPool) -> RunsRanks:
    """Calls `body(transport, *args)` on every rank."""
    return lambda body, ranks, *args: run_over(request.param, pool, body, ranks, *args)


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
            transport.send(peer, Address(direction, 0, (7 * i) % count), (tensor,))
    messages = receive(transport, 2 * count)
    transport.flush()
    assert transport.poll() == []
    return [(m.address, tuple(m.tensors[0].shape), float(m.tensors[0].mean())) for m in messages]


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
            transport.send(1, address, (torch.zeros(2, dtype=torch.float64),))
        transport.flush()
        return []
    transport.expect(edge(0, Direction.FORWARD, (2,)), len(addresses))
    return [m.address for m in receive(transport, len(addresses))]


def test_addresses_arrive_as_they_were_sent(run_ranks: RunsRanks) -> None:
    numbers = [(0, 0), (63, 0), (0, 1 << 40), (1 << 20, 16383), (1, 2)]
    addresses = [Address(Direction.FORWARD, chunk, microbatch) for chunk, microbatch in numbers]
    assert run_ranks(address_round_trip, 2, addresses)[1] == addresses


def send_types(transport: Transport, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    received = []
    for tensor in tensors:
        if transport.rank == 0:
            transport.send(1, Address(Direction.FORWARD, 0, 0), (tensor,))
            transport.flush()
        else:
            transport.expect(edge(0, Direction.FORWARD, tuple(tensor.shape), tensor.dtype), 1)
            received += [m.tensors[0] for m in receive(transport, 1)]
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
            transport.send(1, Address(Direction.FORWARD, 0, i), (buffer.fill_(i),))
            transport.flush()  # After this the buffer is ours again.
        return 0, []
    transport.expect(edge(0, Direction.FORWARD, (5000,)), count)
    messages = receive(transport, count)
    return len({m.tensors[0].data_ptr() for m in messages}), [float(m.tensors[0].mean()) for m in messages]


def test_the_receiver_owns_what_it_gets(run_ranks: RunsRanks) -> None:
    assert run_ranks(keep_all, 2, 12)[1] == (12, [float(i) for i in range(12)])


def large_both_ways(transport: Transport) -> float:
    peer = 1 - transport.rank
    size = 1 << 20
    transport.expect(edge(peer, Direction.FORWARD, (size,)), 2)
    for i in range(2):
        tensor = torch.full((size,), transport.rank, dtype=torch.float64)
        transport.send(peer, Address(Direction.FORWARD, 0, i), (tensor,))
    total = sum(float(m.tensors[0].mean()) for m in receive(transport, 2))
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
        transport.send(after, Address(Direction.FORWARD, 0, hop), (value,))
        arrived = arrived or transport.wait()
        value = arrived.pop(0).tensors[0]
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


# --- several tensors

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)
SPECS = st.builds(
    TensorSpec, st.lists(st.integers(0, 4), max_size=3).map(tuple), st.sampled_from(TYPES)
)  # Scalars and tensors without elements are among them.
MANY = [
    TensorSpec((3, 4, 5), torch.bfloat16),
    TensorSpec((7,), torch.int64),
    TensorSpec((), torch.float32),
    TensorSpec((0, 6), torch.float16),
    TensorSpec((1000, 30), torch.float64),
    TensorSpec((2, 0), torch.int64),
    TensorSpec((3,), torch.float16),
]


def number_of(sender: int, direction: Direction, message: int, tensor: int) -> int:
    return (((sender * 2 + direction) * 1000) + message) * 1000 + tensor


def content(specs: list[TensorSpec], sender: int, direction: Direction, message: int) -> tuple[torch.Tensor, ...]:
    return tuple(filled(spec, number_of(sender, direction, message, k)) for k, spec in enumerate(specs))


Wanted = dict[Direction, list[TensorSpec]]


def neighbours(rank: int, ranks: int) -> list[int]:
    return sorted({(rank - 1) % ranks, (rank + 1) % ranks})


def everyone_both_ways(transport: Transport, ranks: int, specs: Wanted, count: int, seed: int) -> dict[Any, list[Any]]:
    """Every rank sends `count` messages of both directions to both neighbours in a ring, in an order of its own.

    Returns the microbatches that came over each edge, in their order, and whether their contents were right.
    """
    peers = neighbours(transport.rank, ranks)
    for peer in peers:
        for direction in Direction:
            transport.expect(edge_of(peer, direction, specs[direction]), count)
    plan = [(peer, direction) for peer in peers for direction in Direction] * count
    random.Random(seed + transport.rank).shuffle(plan)
    sent = dict.fromkeys(plan, 0)
    for peer, direction in plan:
        i = sent[peer, direction]
        sent[peer, direction] += 1
        # The number of the message tells which it is; the chunk, who sent it. Microbatches come in no order.
        address = Address(direction, transport.rank, (7 * i + 3) % 1009)
        transport.send(peer, address, content(specs[direction], transport.rank, direction, i))
    found: dict[Any, list[Any]] = {(peer, direction): [] for peer in peers for direction in Direction}
    for message in receive(transport, len(plan)):
        direction, sender, microbatch = message.address
        i = len(found[sender, direction])
        expected = content(specs[direction], sender, direction, i)
        same = len(expected) == len(message.tensors) and all(map(same_bits, message.tensors, expected))
        found[sender, direction].append((microbatch, same))
    transport.flush()
    assert transport.poll() == []
    return found


def check_everyone(outcomes: list[dict[Any, list[Any]]], count: int) -> None:
    ranks = len(outcomes)
    for rank, found in enumerate(outcomes):
        assert found.keys() == {(p, d) for p in neighbours(rank, ranks) for d in Direction}
        for messages in found.values():
            assert messages == [((7 * i + 3) % 1009, True) for i in range(count)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_messages_of_several_tensors_come_over_every_edge_in_order(run_ranks: RunsRanks, ranks: int) -> None:
    """Edges as in a V and in loops: both directions from both neighbours, which with two ranks are the same one."""
    specs = {Direction.FORWARD: MANY, Direction.BACKWARD: MANY[:2]}
    check_everyone(run_ranks(everyone_both_ways, ranks, ranks, specs, 12, 5), 12)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SPECS, max_size=4), st.lists(SPECS, max_size=4), st.integers(1, 6), st.integers(0, 99))
def test_any_tensors_in_any_order(
    run_ranks: RunsRanks, forward: list[TensorSpec], backward: list[TensorSpec], count: int, seed: int
) -> None:
    specs = {Direction.FORWARD: forward, Direction.BACKWARD: backward}
    check_everyone(run_ranks(everyone_both_ways, 2, 2, specs, count, seed), count)


def test_very_many_messages_at_once(run_ranks: RunsRanks) -> None:
    specs = {direction: [TensorSpec((5,), torch.float32)] for direction in Direction}
    check_everyone(run_ranks(everyone_both_ways, 2, 2, specs, 300, 1), 300)


# --- what is expected


def two_batches(transport: Transport) -> list[list[int]]:
    if transport.rank == 0:
        for i in range(5):
            transport.send(1, Address(Direction.FORWARD, 0, i), (torch.zeros(1, dtype=torch.float64),))
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
    transport.send(peer, Address(Direction.FORWARD, 0, 0), (torch.zeros(1, dtype=torch.float64),))
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
        transport.send(peer, Address(Direction.BACKWARD, 0, i), (torch.zeros(1000, dtype=torch.float64),))
    transport.flush()
    receive(transport, 2)
    return [(s.kind, s.microbatch, s.direction, s.end >= s.start) for s in transport.spans.spans]


def test_each_send_is_one_span(run_ranks: RunsRanks) -> None:
    for spans in run_ranks(traced, 2):
        assert sorted(spans) == [(SpanKind.SEND, i, Direction.BACKWARD, True) for i in range(2)]


# --- what is refused

EXPECTED = [TensorSpec((4, 3), torch.float32), TensorSpec((2,), torch.int64)]
OTHERS = {
    "another shape of as many bytes": [TensorSpec((3, 4), torch.float32), EXPECTED[1]],
    "a smaller microbatch": [TensorSpec((2, 3), torch.float32), EXPECTED[1]],
    "a larger microbatch": [TensorSpec((4000, 3), torch.float32), EXPECTED[1]],
    "another type": [TensorSpec((4, 3), torch.int32), EXPECTED[1]],
    "too few": EXPECTED[:1],
    "too many": [*EXPECTED, EXPECTED[1]],
    "another order": EXPECTED[::-1],
    "none": [],
}


def sends_another(transport: Transport, others: list[TensorSpec], announced: bool) -> str:
    """A message that is right, then one that is not. Returns what the rank is told that finds it out."""
    right, wrong = (content(specs, 0, Direction.BACKWARD, 0) for specs in (EXPECTED, others))
    if transport.rank == 1:
        transport.expect(edge_of(0, Direction.BACKWARD, EXPECTED), 1 if announced else 2)
        if announced:
            receive(transport, 1)
            return ""
        with pytest.raises(TransportError) as error:
            receive(transport, 2)
        return str(error.value)
    if announced:
        transport.announce(edge_of(1, Direction.BACKWARD, EXPECTED))
    transport.send(1, Address(Direction.BACKWARD, 2, 5), right)
    if not announced:
        transport.send(1, Address(Direction.BACKWARD, 2, 6), wrong)
        return ""
    with pytest.raises(TransportError) as error:
        transport.send(1, Address(Direction.BACKWARD, 2, 6), wrong)
    transport.flush()
    return str(error.value)


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "not announced"])
def test_tensors_that_are_not_those_of_the_edge_are_refused(run_ranks: RunsRanks, announced: bool) -> None:
    for others in OTHERS.values():
        told = run_ranks(sends_another, 2, others, announced)[0 if announced else 1]
        found = " ".join(map(str, others)) or "no tensors"
        assert told == (
            f"the backward message of chunk 2, microbatch 6 from rank 0 to rank 1 carries {found}, "
            "but float32[4,3] int64[2] is expected; "
            "every microbatch must have the shapes and types that its edge was given"
        )


def sends_in_pieces(transport: Transport) -> str:
    with pytest.raises(TransportError) as error:
        transport.send(1 - transport.rank, Address(Direction.FORWARD, 0, 3), (torch.zeros(4, 4).t()[1:],))
    return str(error.value)


def test_memory_in_pieces_is_refused(run_ranks: RunsRanks) -> None:
    told = run_ranks(sends_in_pieces, 2)[0]
    assert "microbatch 3 from rank 0 to rank 1 carries tensors that are not contiguous" in told


def from_another_device(transport: Transport) -> list[str]:
    elsewhere = torch.zeros(2, device="meta")
    told = []
    for call in (
        lambda: transport.send(1 - transport.rank, Address(Direction.FORWARD, 0, 0), (elsewhere,)),
        lambda: transport.expect(
            MessageEdge(peer=1 - transport.rank, direction=Direction.FORWARD, tensors=(), device=elsewhere.device), 1
        ),
    ):
        with pytest.raises(TransportError) as error:
            call()
        told.append(str(error.value))
    return told


@pytest.mark.parametrize("name", ["mpi", "torch"])
def test_tensors_of_another_device_are_refused(name: str, pool: RankPool) -> None:
    for rank, told in enumerate(run_over(name, pool, from_another_device, 2)):
        assert [text.split(";")[0] for text in told] == [
            f"rank {rank}: a message with tensors on 'meta', but this transport was made for 'cpu'"
        ] * 2


@given(st.lists(SPECS, max_size=60), st.sampled_from(Direction), st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_header_says_what_follows(specs: list[TensorSpec], direction: Direction, chunk: int, microbatch: int) -> None:
    tensors = [torch.empty(spec.shape, dtype=spec.dtype) for spec in specs]
    address = Address(direction, chunk, microbatch)
    header = pack_header(address, tensors)
    assert len(header) == HEADER_BYTES
    assert open_header(header, edge_of(0, direction, specs), rank=1) == address
    # However long the list, the last tensor is told from another one.
    wrong = [*specs[:-1], TensorSpec((9, 9), torch.int8)]
    with pytest.raises(TransportError, match=f"chunk {chunk}, microbatch {microbatch} from rank 0 to rank 1 carries"):
        open_header(header, edge_of(0, direction, wrong), rank=1)


# --- the end


def aborts(transport: Transport, size: int) -> bool:
    """A batch that ends in the middle: nothing that was sent is received, nothing that is expected was sent."""
    peer = 1 - transport.rank
    other = Direction(transport.rank)
    transport.expect(edge(peer, other, (size,)), 3)
    transport.send(peer, Address(other, 0, 0), (torch.zeros(size, dtype=torch.float64),))
    return transport.poll() == []


def test_closing_after_an_aborted_batch_ends_at_once(run_ranks: RunsRanks) -> None:
    before = run_ranks(own_threads, 2)
    for size in (2, 1 << 17):
        assert run_ranks(aborts, 2, size) == [True, True]
    # Only the thread of the transport that is asked has come: those of the aborted ones have ended.
    for earlier, now in zip(before, run_ranks(own_threads, 2), strict=True):
        assert len(now - earlier) <= 1


# --- failures in process


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
    assert "rank 1 waits for all-reduce sum 0 of ranks (0, 1, 2)" in str(error.value)
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
