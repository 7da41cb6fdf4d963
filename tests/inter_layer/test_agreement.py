"""The ranks of a stage run the same tasks in the same order, whatever order their messages arrive in."""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from axonn.distributed.runtime import connect
from axonn.distributed.transport import Address, Decision, Decisions, Message, SentMessage, Transport
from axonn.errors import DeadlockError, TransportError
from axonn.grid import Axis, ProcessGrid
from axonn.inter_layer.stage_leader import StageCoordinator
from axonn.schedules import ChunkLayout, Direction, Forwards, MessageDriven, ScheduleSpec, StageSchedule, Task
from tests.helpers.comparing import check_every_rank, check_same_bits
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import Case, Outcome, train, train_in_process
from tests.schedules.test_schedules import DRIVEN, Driver, make_all, specs

# --- schedules


@settings(max_examples=100)
@given(specs(), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32))
def test_a_schedule_that_says_so_follows_no_arrivals(
    spec: ScheduleSpec, stages: int, microbatches: int, seed: int
) -> None:
    schedules = make_all(spec, stages, microbatches)
    assert {s.follows_arrivals for s in schedules} == {spec.name in DRIVEN and stages > 1}
    orders = []
    for number in (seed, seed + 1):
        driver = Driver(make_all(spec, stages, microbatches), ahead=0, rng=random.Random(number))
        driver.run()
        orders.append(driver.executed)
    if not schedules[0].follows_arrivals:
        assert orders[0] == orders[1]


PICKED = [("message-driven", pick) for pick in ("backward-first", "forward-first", "arrival-order", "1f1b")] + [
    ("message-driven-zero-bubble", pick) for pick in ("backward-first", "forward-first", "arrival-order", "zero-bubble")
]


@pytest.mark.parametrize(("name", "pick"), PICKED)
def test_every_pick_rule_follows_arrivals(name: str, pick: str) -> None:
    """Also an order of tasks: of those that are there the first one runs."""
    spec = ScheduleSpec(name=name, pick=pick)
    orders = set()
    for seed in range(20):
        driver = Driver(make_all(spec, 3, 6), ahead=0, rng=random.Random(seed))
        driver.run()
        orders.add(tuple(driver.executed[1]))
    assert len(orders) > 1


# --- agreement, without an engine


class Wire:
    """A transport as the agreement sees it; a decision is heard some time after it was told."""

    def __init__(self, rank: int, decisions: dict[tuple[int, int], deque[Decision]], rng: random.Random) -> None:
        self._rank, self._decisions, self._rng = rank, decisions, rng
        self._leader = -1
        self.left = 0

    def expect_decisions(self, peer: int, count: int) -> None:
        assert self.left == 0
        self._leader, self.left = peer, count

    def send_decision(self, peer: int, decision: Decision) -> None:
        self._decisions.setdefault((self._rank, peer), deque()).append(decision)

    def poll_decisions(self) -> list[Decision]:
        waiting = self._decisions.setdefault((self._leader, self._rank), deque())
        heard = [waiting.popleft() for _ in range(self._rng.randint(0, len(waiting)))]
        self.left -= len(heard)
        assert self.left >= 0
        return heard


class Stages:
    """Runs the schedules of a whole grid. A task is a collective: it ends once every rank of its stage has begun it.

    What happens next is drawn at random. `agree`: whether ranks agree, or each one follows what it gets itself.
    """

    def __init__(self, grid: ProcessGrid, schedules: list[StageSchedule], seed: int, *, agree: bool = True) -> None:
        self.grid = grid
        self.rng = random.Random(seed)
        self.decisions: dict[tuple[int, int], deque[Decision]] = {}
        self.transports = [Wire(rank, self.decisions, self.rng) for rank in range(grid.size)]
        apart = ProcessGrid(inter=grid.inter)
        self.agreements = [
            StageCoordinator(grid, rank, wire) if agree else StageCoordinator(apart, 0, None)  # type: ignore[arg-type]
            for rank, wire in enumerate(self.transports)
        ]
        self.schedules = [a.begin(s) for a, s in zip(self.agreements, schedules, strict=True)]
        self.running: list[Task | None] = [None] * grid.size
        self.begun: list[list[Task]] = [[] for _ in range(grid.size)]
        self.wires: dict[tuple[int, int, Direction], deque[Address]] = {}
        self.slowness: dict[object, int] = {}

    def run(self) -> None:
        idle = 0
        while not all(schedule.done for schedule in self.schedules):
            moves: list[Any] = list(range(self.grid.size)) + [way for way, wire in self.wires.items() if wire]
            weights = [1 / self.slowness.setdefault(move, self.rng.choice((1, 1, 20))) for move in moves]
            move = self.rng.choices(moves, weights)[0]
            went_on = self._step(move) if isinstance(move, int) else self._deliver(move)
            idle = 0 if went_on else idle + 1
            assert idle < 100 or not self._stuck(), f"deadlock: {[s.waiting_for() for s in self.schedules]}"
        assert not any(self.wires.values())
        assert not any(wire.left for wire in self.transports)

    def _stuck(self) -> bool:
        """Whether nothing is under way and no rank can go on; one that can does."""
        under_way = any(self.wires.values()) or any(self.decisions.values())
        return not under_way and not any(self._step(rank) for rank in range(self.grid.size))

    def _step(self, rank: int) -> bool:
        if self.running[rank] is not None:
            return self._finish(rank)
        task = self.agreements[rank].next_task(self.schedules[rank])
        if task is None:
            return False
        self.running[rank] = task
        self.begun[rank].append(task)
        number = len(self.begun[rank])
        others = [self.begun[r][number - 1] for r in self._stage(rank) if len(self.begun[r]) >= number]
        assert set(others) == {task}, f"collectives of {others} meet"
        return True

    def _finish(self, rank: int) -> bool:
        number = len(self.begun[rank])
        if any(len(self.begun[r]) < number for r in self._stage(rank)):
            return False
        task, self.running[rank] = self.running[rank], None
        assert task is not None
        schedule = self.schedules[rank]
        schedule.finished(task)
        direction = task.kind.sends
        stage = self.grid.coordinates(rank).inter
        target = None if direction is None else schedule.layout.target(stage, task.chunk, direction)
        if direction is None or target is None:
            return True
        address = Address(direction, target[1], task.microbatch)
        if target[0] == stage:
            schedule.arrived(*address)
        else:
            peer = self.grid.group(rank, ["inter"])[target[0]]
            self.wires.setdefault((rank, peer, direction), deque()).append(address)
        return True

    def _deliver(self, way: tuple[int, int, Direction]) -> bool:
        self.schedules[way[1]].arrived(*self.wires[way].popleft())
        return True

    def _stage(self, rank: int) -> tuple[int, ...]:
        axes: list[Axis] = ["row", "col"]
        return self.grid.group(rank, axes)


GRIDS = st.builds(
    ProcessGrid, data=st.integers(1, 2), inter=st.integers(1, 4), row=st.integers(1, 2), col=st.integers(1, 3)
)
EVALUATION = st.builds(
    lambda chunks, placement: ScheduleSpec(name="evaluation", chunks=chunks, placement=placement),
    st.integers(1, 3),
    st.sampled_from(["loop", "v"]),
)


def schedules_of(grid: ProcessGrid, spec: ScheduleSpec, microbatches: int) -> list[StageSchedule]:
    def of_stages() -> list[StageSchedule]:
        if spec.name != "evaluation":
            return make_all(spec, grid.inter, microbatches)
        layout = ChunkLayout(stages=grid.inter, chunks=spec.chunks, placement=spec.placement)
        return [
            Forwards(stage=s, stages=grid.inter, microbatches=microbatches, layout=layout) for s in range(grid.inter)
        ]

    return [of_stages()[grid.coordinates(rank).inter] for rank in range(grid.size)]


@settings(max_examples=150)
@given(GRIDS, specs() | EVALUATION, st.integers(1, 6), st.integers(0, 2**32))
def test_no_order_of_messages_sets_two_ranks_of_a_stage_on_different_tasks(
    grid: ProcessGrid, spec: ScheduleSpec, microbatches: int, seed: int
) -> None:
    stages = Stages(grid, schedules_of(grid, spec, microbatches), seed)
    stages.run()
    for rank, (schedule, begun) in enumerate(zip(stages.schedules, stages.begun, strict=True)):
        assert schedule.done
        assert len(begun) == len(set(begun)) == schedule.tasks, rank
        assert schedule.waiting_for() == "nothing"
        assert schedule.next_task() is None


@pytest.mark.parametrize(
    "spec",
    [
        ScheduleSpec(pick="forward-first"),
        ScheduleSpec(pick="1f1b"),
        ScheduleSpec(name="message-driven-zero-bubble"),
        ScheduleSpec(name="evaluation", chunks=2),
    ],
    ids=lambda spec: f"{spec.name}, {spec.pick}",
)
def test_without_agreement_ranks_of_a_stage_meet_in_different_tasks(spec: ScheduleSpec) -> None:
    """The property can fail."""
    grid = ProcessGrid(inter=3, col=2)

    def run() -> None:
        for seed in range(50):
            Stages(grid, schedules_of(grid, spec, 6), seed, agree=False).run()

    with pytest.raises(AssertionError, match=r"deadlock|collectives of .* meet"):
        run()


# --- the engine, in process

GRID_EXTENTS = [
    {"inter": 2, "col": 2},
    {"inter": 2, "row": 2, "col": 2},
    {"inter": 3, "row": 2},
    {"inter": 4, "col": 2},
    {"data": 2, "inter": 2, "row": 2},
]
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"limit": 2},
    {"pick": "forward-first"},
    {"pick": "arrival-order", "limit": 3},
    {"pick": "1f1b"},
    {"chunks": 2, "placement": "v"},
    {"chunks": 2, "pick": "arrival-order"},
    {"schedule": "message-driven-zero-bubble"},
    {"schedule": "message-driven-zero-bubble", "pick": "forward-first", "chunks": 2, "placement": "v"},
    {"schedule": "message-driven-zero-bubble", "chunks": 3, "limit": 3},
    {"schedule": "gpipe"},
    {"schedule": "1f1b"},
    {"schedule": "interleaved-1f1b", "chunks": 2},
    {"schedule": "zero-bubble", "chunks": 2, "placement": "v"},
]
MICROBATCHES = 5


def case_of(grid: dict[str, int], schedule: dict[str, Any], **more: Any) -> Case:
    return Case(**grid, **schedule, **{"microbatches": MICROBATCHES, "steps": 2, **more})


def name_of(case: Case) -> str:
    extents = "x".join(str(case.grid.extent(axis)) for axis in ("data", "inter", "row", "col"))
    return f"{extents}-{case.schedule}-{case.pick}-limit {case.limit}-{case.chunks} {case.placement}"


def check_orders(case: Case, seeds: int) -> None:
    first = train_in_process(case)
    check_every_rank(case, first)
    for seed in range(seeds):
        check_same_bits(first, train_in_process(case, order_seed=seed))


# Each schedule on one grid, and each grid with several schedules.
CHOSEN = [case_of(GRID_EXTENTS[i % len(GRID_EXTENTS)], schedule) for i, schedule in enumerate(SCHEDULES)]
REST = [case for g in GRID_EXTENTS for s in SCHEDULES if (case := case_of(g, s)) not in CHOSEN]


@pytest.mark.parametrize("case", CHOSEN, ids=name_of)
def test_no_order_of_messages_changes_a_bit(case: Case) -> None:
    check_orders(case, seeds=2)


@pytest.mark.full
@pytest.mark.parametrize("case", REST, ids=name_of)
def test_no_order_of_messages_changes_a_bit_on_any_grid(case: Case) -> None:
    check_orders(case, seeds=12)


@pytest.mark.parametrize("sub_shards", [1, 4])
@pytest.mark.parametrize("recompute", [None, 1])
def test_sub_shards_and_recomputation_change_nothing(sub_shards: int, recompute: int | None) -> None:
    more = {"sub_shards": sub_shards, "recompute": recompute, "tied": True, "steps": 1}
    check_orders(case_of(GRID_EXTENTS[0], {"pick": "arrival-order", "chunks": 2}, **more), seeds=2)


def test_without_agreement_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: they do when every rank follows its own messages."""
    case = case_of(GRID_EXTENTS[0], {"pick": "forward-first"}, steps=1)
    seeds = 10

    def run() -> None:
        for seed in range(seeds):
            train_in_process(case, order_seed=seed)

    run()
    monkeypatch.setattr(MessageDriven, "follows_arrivals", False)
    with pytest.raises((DeadlockError, TransportError)):
        run()


def test_without_agreement_evaluation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    # A static schedule, so that only the evaluation can fail.
    case = case_of({"inter": 2, "col": 2}, {"schedule": "interleaved-1f1b", "chunks": 2}, steps=1, microbatches=6)
    first = train_in_process(case)
    seeds = 10

    def run() -> None:
        for seed in range(seeds):
            check_same_bits(first, train_in_process(case, order_seed=seed))

    run()
    monkeypatch.setattr(Forwards, "follows_arrivals", False)
    with pytest.raises((DeadlockError, TransportError, AssertionError)):
        run()


# --- what it costs


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("grid", [GRID_EXTENTS[1], {"inter": 2}], ids=str)
def test_the_leader_tells_each_task_to_each_other_rank_once(grid: dict[str, int], schedule: dict[str, Any]) -> None:
    case = case_of(grid, schedule, steps=1)
    driven = case.schedule in DRIVEN
    kinds = 3 if "zero-bubble" in case.schedule else 2
    # Forwards of several chunks in the evaluation, and the tasks of the training.
    tasks = MICROBATCHES * case.chunks * ((case.chunks > 1) + kinds * driven)
    for rank, outcome in enumerate(train_in_process(case)):
        here = case.grid.coordinates(rank)
        leads = here.row == here.col == 0
        poll_decisions = (case.grid.tensor - 1) * tasks if leads else 0
        assert outcome.decisions == Decisions(messages=poll_decisions, bytes=24 * poll_decisions), rank


def test_messages_are_counted_by_peer_and_direction() -> None:
    case = case_of({"inter": 3, "row": 2}, {}, steps=1)
    hidden, length = case.model.hidden // 2, case.model.seq_len
    elements = 4 * length * hidden
    for rank, outcome in enumerate(train_in_process(case)):
        stage, row = divmod(rank, 2)
        expected = {}
        # Twice forward, since each batch is evaluated too.
        if stage < 2:
            expected[SentMessage(rank + 2, Direction.FORWARD, elements, 8 * elements)] = 2 * MICROBATCHES
        if stage > 0:
            expected[SentMessage(rank - 2, Direction.BACKWARD, elements, 8 * elements)] = MICROBATCHES
        assert outcome.messages == expected, f"stage {stage}, row {row}"


# --- over real transports


class Uneven:
    """Sends the messages of one direction late, and the others so by chance."""

    def __init__(self, transport: Transport, late: Direction, seed: int) -> None:
        self._send = transport._send
        self._late = late
        self._delay_s = 0.006 * 2**seed  # On a busy machine tasks take longer than a short delay, and hide it.
        self._rng = random.Random(f"{seed} {transport.rank}")

    def __call__(self, peer: int, address: Address, tensors: Any) -> None:
        time.sleep(self._delay_s if address.direction == self._late else self._rng.choice((0.0, 0.001)))
        self._send(peer, address, tensors)


def train_unevenly(comm: MPI.Intracomm, case: Case, seed: int) -> tuple[Outcome, list[Address]]:
    """A job of the rank pool. Also returns the messages of this rank in the order in which they arrived."""
    arrived: list[Address] = []
    with connect(case.grid, comm=comm, transport=case.transport) as runtime:
        transport = runtime.transport
        assert transport is not None
        here = case.grid.coordinates(runtime.rank)
        transport._send = Uneven(transport, Direction(here.row + here.col), seed)  # type: ignore[method-assign]
        poll = transport.poll

        def listen() -> list[Message]:
            messages = poll()
            arrived.extend(message.address for message in messages)
            return messages

        transport.poll = listen  # type: ignore[method-assign]
        outcome = train(case, runtime.rank, transport, runtime.collectives)
        return outcome, arrived


UNEVEN = [
    case_of({"inter": 3, "col": 2}, {"pick": "arrival-order"}),
    case_of({"inter": 3, "row": 2}, {"pick": "forward-first", "chunks": 2}),
    case_of({"inter": 4, "col": 2}, {"schedule": "message-driven-zero-bubble", "chunks": 2, "placement": "v"}),
]


@pytest.mark.parametrize("transport", ["mpi", "torch"])
@pytest.mark.parametrize("case", UNEVEN, ids=name_of)
def test_ranks_of_a_stage_whose_messages_come_in_other_orders_agree(case: Case, transport: str, pool: RankPool) -> None:
    case = replace(case, transport=transport)
    differ = False
    for seed in range(6):
        results = pool.run(train_unevenly, case, seed, ranks=case.grid.size, timeout_s=300)
        check_every_rank(case, [outcome for outcome, _ in results])
        orders = [{tuple(results[rank][1]) for rank in stage} for stage in case.grid.groups(["row", "col"])]
        differ = differ or any(len(found) > 1 for found in orders)
        if differ and seed:
            return
    pytest.fail("the ranks of a stage always saw their messages in the same order")
