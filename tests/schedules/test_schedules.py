"""Schedules under adversarial message orders: any order that keeps each edge and direction first in, first out."""

from __future__ import annotations

import itertools
import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axonn.errors import ConfigError
from axonn.schedules import (
    PICKS,
    ChunkLayout,
    ChunkPlacement,
    Direction,
    Kind,
    MessageDriven,
    ScheduleSpec,
    StageSchedule,
    StaticSchedule,
    Task,
    make_schedule,
    names,
)

DRIVEN = ("message-driven", "message-driven-zero-bubble")


class Driver:
    """Drives the schedules of one pipeline; what happens next is drawn at random, some actors being much slower.

    `ahead` is how many tasks a stage's host hands out beyond the one that runs. Checks every promise at every step.
    """

    def __init__(self, schedules: list[StageSchedule], *, ahead: int, rng: random.Random) -> None:
        self.schedules = schedules
        self.ahead = ahead
        self.rng = rng
        stages = range(len(schedules))
        self.handed: list[deque[Task]] = [deque() for _ in stages]
        # By receiver, sender and direction; in it (chunk of the receiver, microbatch).
        self.wires: dict[tuple[int, int, Direction], deque[tuple[int, int]]] = {}
        self.arrived: list[set[tuple[Direction, int, int]]] = [set() for _ in stages]
        self.waits = [False] * len(schedules)
        self.executed: list[list[Task]] = [[] for _ in stages]
        self.most_held = [0] * len(schedules)
        self.slowness: dict[tuple[object, ...], int] = {}

    def run(self) -> None:
        while choices := self._choices():
            weights = [1 / self.slowness.setdefault(choice, self.rng.choice((1, 1, 20))) for choice in choices]
            what, stage, *wire = self.rng.choices(choices, weights)[0]
            if what == "host":
                self._ask(stage)
            elif what == "device":
                self._finish(stage)
            else:
                self._deliver(stage, *wire)
            self._check(stage)
        waiting = {stage: s.waiting_for() for stage, s in enumerate(self.schedules) if not s.done}
        assert not waiting, f"deadlock: {waiting}"

    def _choices(self) -> list[tuple]:
        choices: list[tuple] = [("wire", *edge) for edge, wire in self.wires.items() if wire]
        for stage, tasks in enumerate(self.handed):
            if tasks:
                choices.append(("device", stage))
            if len(tasks) <= self.ahead and not self.waits[stage]:
                choices.append(("host", stage))
        return choices

    def _ask(self, stage: int) -> None:
        task = self.schedules[stage].next_task()
        if task is not None:
            self.handed[stage].append(task)
            return
        self.waits[stage] = True  # until something happens to this stage
        if isinstance(self.schedules[stage], MessageDriven):
            kinds = [t.kind for t in itertools.chain(self.executed[stage], self.handed[stage])]
            assert kinds.count(Kind.INPUT) == kinds.count(Kind.WEIGHT), "it waits while a weight half is pending"

    def _finish(self, stage: int) -> None:
        task = self.handed[stage].popleft()
        kind, chunk, microbatch = task
        schedule, executed = self.schedules[stage], self.executed[stage]
        layout, direction = schedule.layout, kind.sends
        fed = layout.is_source if direction == Direction.FORWARD else layout.is_sink
        if direction is None:
            assert Task(Kind.INPUT, chunk, microbatch) in executed, f"{task} ran before its input half"
        elif not fed(stage, chunk):
            assert (direction, chunk, microbatch) in self.arrived[stage], f"{task} ran without its input"
        if direction == Direction.BACKWARD:
            assert Task(Kind.FORWARD, chunk, microbatch) in executed, f"{task} ran before its forward"
        executed.append(task)
        schedule.finished(task)
        self.waits[stage] = False
        target = None if direction is None else layout.target(stage, chunk, direction)
        if target is None:
            return
        if target[0] == stage:
            self._arrive(stage, direction, target[1], microbatch)
        else:
            self.wires.setdefault((target[0], stage, direction), deque()).append((target[1], microbatch))

    def _deliver(self, stage: int, sender: int, direction: Direction) -> None:
        self._arrive(stage, direction, *self.wires[stage, sender, direction].popleft())

    def _arrive(self, stage: int, direction: Direction, chunk: int, microbatch: int) -> None:
        self.arrived[stage].add((direction, chunk, microbatch))
        self.schedules[stage].arrived(direction, chunk, microbatch)
        self.waits[stage] = False

    def _check(self, stage: int) -> None:
        schedule = self.schedules[stage]
        # On the device: forwards that have started and whose backward has not finished.
        started = [*self.executed[stage], *list(self.handed[stage])[:1]]
        last = Kind.WEIGHT if schedule.splits_backward else Kind.BACKWARD
        held = sum(t.kind == Kind.FORWARD for t in started) - sum(t.kind == last for t in self.executed[stage])
        self.most_held[stage] = max(self.most_held[stage], held)
        assert held <= schedule.limit
        assert schedule.held >= held
        if self.ahead == 0 or isinstance(schedule, MessageDriven):
            # A fixed order that is read ahead hands out its next forward before the backward ahead of it is done.
            assert schedule.held <= schedule.limit


@st.composite
def specs(draw: st.DrawFn) -> ScheduleSpec:
    name = draw(st.sampled_from(sorted(names())))
    if name in DRIVEN:
        chunks = draw(st.integers(1, 3))
        placement: ChunkPlacement = draw(st.sampled_from(("loop", "v"))) if chunks > 1 else "loop"
        split = name == "message-driven-zero-bubble"
        picks = list(PICKS)
        if split and (chunks == 1 or (chunks, placement) == (2, "v")):
            picks.append("zero-bubble")
        if not split and chunks == 1:
            picks += ["gpipe", "1f1b"]
        if not split and chunks > 1 and placement == "loop":
            picks.append("interleaved-1f1b")
        limit = draw(st.none() | st.integers(1, 10))
        return ScheduleSpec(
            name=name, in_flight_limit=limit, pick=draw(st.sampled_from(picks)), chunks=chunks, placement=placement
        )
    if name == "interleaved-1f1b":
        return ScheduleSpec(name=name, chunks=draw(st.integers(2, 4)))
    if name == "zero-bubble" and draw(st.booleans()):
        return ScheduleSpec(name=name, chunks=2, placement="v")
    return ScheduleSpec(name=name)


def make_all(spec: ScheduleSpec, stages: int, microbatches: int) -> list[StageSchedule]:
    return [make_schedule(spec, stage=s, stages=stages, microbatches=microbatches) for s in range(stages)]


@settings(max_examples=400)
@given(
    spec=specs(),
    stages=st.integers(1, 6),
    microbatches=st.integers(1, 12),
    ahead=st.integers(0, 1),
    seed=st.integers(0, 2**32),
)
def test_every_schedule_keeps_its_promises_in_any_order(
    spec: ScheduleSpec, stages: int, microbatches: int, ahead: int, seed: int
) -> None:
    schedules = make_all(spec, stages, microbatches)
    driver = Driver(schedules, ahead=ahead, rng=random.Random(seed))
    driver.run()
    halves = (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT)
    kinds = halves if spec.name in ("zero-bubble", "message-driven-zero-bubble") else (Kind.FORWARD, Kind.BACKWARD)
    for stage, schedule in enumerate(schedules):
        executed = driver.executed[stage]
        assert len(executed) == len(kinds) * spec.chunks * microbatches
        for kind, chunk in itertools.product(kinds, range(spec.chunks)):
            assert [t.microbatch for t in executed if t[:2] == (kind, chunk)] == list(range(microbatches))
        assert schedule.splits_backward == (kinds == halves)
        assert schedule.done
        assert schedule.held == 0
        assert schedule.next_task() is None
        assert schedule.waiting_for() == "nothing"
        assert driver.most_held[stage] <= schedule.limit <= most_allowed(spec, stage, stages, microbatches)
    assert not any(driver.wires.values())


def most_allowed(spec: ScheduleSpec, stage: int, stages: int, microbatches: int) -> int:
    """Pairs of chunk and microbatch that a stage may hold."""
    most = {
        "gpipe": microbatches,
        "1f1b": stages - stage,
        "interleaved-1f1b": 2 * (stages - 1 - stage) + (spec.chunks - 1) * stages + 1,
        "zero-bubble": stages * spec.chunks,
    }.get(spec.name, (spec.in_flight_limit or 2 * stages) * spec.chunks)
    return min(microbatches * spec.chunks, most)


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "spec",
    [
        ScheduleSpec(name="gpipe"),
        ScheduleSpec(name="1f1b"),
        ScheduleSpec(name="interleaved-1f1b", chunks=2),
        ScheduleSpec(name="interleaved-1f1b", chunks=3),
        ScheduleSpec(name="zero-bubble"),
        ScheduleSpec(name="zero-bubble", chunks=2, placement="v"),
        ScheduleSpec(in_flight_limit=3, chunks=2),
        ScheduleSpec(name="message-driven-zero-bubble", in_flight_limit=3, chunks=2, placement="v"),
    ],
)
def test_the_limit_is_exactly_what_the_schedule_may_hold(spec: ScheduleSpec, stages: int) -> None:
    # Few microbatches leave places of interleaved 1F1B and ZB-V empty.
    fills = spec.chunks > 1 and spec.name in ("interleaved-1f1b", "zero-bubble")
    for microbatches in (4 * stages,) if fills else (1, stages, 4 * stages):
        limits = [s.limit for s in make_all(spec, stages, microbatches)]
        assert limits == [most_allowed(spec, s, stages, microbatches) for s in range(stages)]


def test_the_driver_finds_a_deadlock() -> None:
    """The property test can fail: two fixed orders that wait for each other are a deadlock in every order."""
    texts = [["0F0", "0B0", "0F1", "0B1"], ["0F0", "0F1", "0B0", "0B1"]]
    stuck: list[StageSchedule] = [
        StaticSchedule(
            stage=s, stages=2, microbatches=2, layout=ChunkLayout(stages=2), order=[Task.parse(t) for t in order]
        )
        for s, order in enumerate(texts)
    ]
    with pytest.raises(AssertionError, match=r"deadlock: \{0: 'the gradient of microbatch 0.*1: 'the activation of mi"):
        Driver(stuck, ahead=0, rng=random.Random(0)).run()


# --- message-driven


def message_driven(stage: int, stages: int, microbatches: int, limit: int, pick: str) -> MessageDriven:
    layout = ChunkLayout(stages=stages)
    return MessageDriven(
        stage=stage, stages=stages, microbatches=microbatches, layout=layout, in_flight_limit=limit, pick=pick
    )


def take_all(schedule: StageSchedule) -> list[str]:
    """Run tasks until the schedule waits."""
    tasks = []
    while (task := schedule.next_task()) is not None:
        tasks.append(str(task))
        schedule.finished(task)
    return tasks


@pytest.mark.parametrize("pick", PICKS)
def test_the_first_stage_starts_as_many_forwards_as_the_limit_and_one_per_finished_backward(pick: str) -> None:
    schedule = message_driven(0, 4, 6, 3, pick)
    assert take_all(schedule) == ["0F0", "0F1", "0F2"]
    for microbatch in range(3):
        schedule.arrived(Direction.BACKWARD, 0, microbatch)
        assert take_all(schedule) == [f"0B{microbatch}", f"0F{microbatch + 3}"]
    for microbatch in range(3, 6):
        assert not schedule.done
        schedule.arrived(Direction.BACKWARD, 0, microbatch)
        assert take_all(schedule) == [f"0B{microbatch}"]
    assert schedule.done


def test_the_first_stage_injects_after_a_backward_has_finished_not_when_it_was_handed_out() -> None:
    schedule = message_driven(0, 2, 4, 2, "backward-first")
    take_all(schedule)
    schedule.arrived(Direction.BACKWARD, 0, 0)
    backward = schedule.next_task()
    assert str(backward) == "0B0"
    assert schedule.next_task() is None
    assert backward is not None
    schedule.finished(backward)
    assert take_all(schedule) == ["0F2"]


def test_a_limit_above_the_microbatches_starts_them_all() -> None:
    assert take_all(message_driven(0, 2, 3, 10, "backward-first")) == ["0F0", "0F1", "0F2"]


def test_the_last_stage_runs_each_backward_right_after_its_forward() -> None:
    schedule = message_driven(2, 3, 3, 3, "backward-first")
    for microbatch in range(3):
        schedule.arrived(Direction.FORWARD, 0, microbatch)
    assert take_all(schedule) == ["0F0", "0B0", "0F1", "0B1", "0F2", "0B2"]


@pytest.mark.parametrize("pick", PICKS)
def test_a_single_stage_runs_without_messages(pick: str) -> None:
    schedule = message_driven(0, 1, 3, 1, pick)
    assert take_all(schedule) == ["0F0", "0B0", "0F1", "0B1", "0F2", "0B2"]
    assert schedule.done


@pytest.mark.parametrize(
    ("pick", "order"),
    [
        ("backward-first", ["0B0", "0F1", "0F2"]),
        ("forward-first", ["0F1", "0F2", "0B0"]),
        ("arrival-order", ["0F1", "0B0", "0F2"]),
    ],
)
def test_the_pick_rule_decides_between_ready_tasks(pick: str, order: list[str]) -> None:
    schedule = message_driven(1, 3, 4, 4, pick)
    schedule.arrived(Direction.FORWARD, 0, 0)
    assert take_all(schedule) == ["0F0"]
    schedule.arrived(Direction.FORWARD, 0, 1)
    schedule.arrived(Direction.BACKWARD, 0, 0)
    schedule.arrived(Direction.FORWARD, 0, 2)
    assert take_all(schedule) == order


@pytest.mark.parametrize(
    ("pick", "order"),
    [
        ("backward-first", ["0B0", "0F1", "0F2", "0F3"]),
        ("forward-first", ["0F1", "0F2", "0B0", "0F3"]),
        ("arrival-order", ["0B0", "0F1", "0F2", "0F3"]),
    ],
)
def test_on_the_first_stage_an_injection_counts_as_a_ready_forward(pick: str, order: list[str]) -> None:
    schedule = message_driven(0, 2, 4, 3, pick)
    first = schedule.next_task()
    assert first is not None
    schedule.finished(first)
    schedule.arrived(Direction.BACKWARD, 0, 0)
    assert take_all(schedule) == order


def test_the_default_limit_is_twice_the_stages() -> None:
    assert make_schedule(ScheduleSpec(), stage=0, stages=3, microbatches=20).limit == 6


def driven(stage: int, stages: int, microbatches: int, **options: object) -> StageSchedule:
    spec = ScheduleSpec(name="message-driven-zero-bubble", **options)
    return make_schedule(spec, stage=stage, stages=stages, microbatches=microbatches)


def test_split_backwards_run_their_weight_half_when_nothing_else_is_ready() -> None:
    schedule = driven(1, 3, 3)
    for microbatch in range(2):
        schedule.arrived(Direction.FORWARD, 0, microbatch)
    assert take_all(schedule) == ["0F0", "0F1"]
    schedule.arrived(Direction.FORWARD, 0, 2)
    schedule.arrived(Direction.BACKWARD, 0, 0)
    schedule.arrived(Direction.BACKWARD, 0, 1)
    assert take_all(schedule) == ["0I0", "0I1", "0F2", "0W0", "0W1"]


def test_a_full_budget_runs_the_weight_half_before_the_next_forward() -> None:
    schedule = driven(1, 3, 4, in_flight_limit=2)
    for microbatch in range(2):
        schedule.arrived(Direction.FORWARD, 0, microbatch)
    assert take_all(schedule) == ["0F0", "0F1"]
    schedule.arrived(Direction.FORWARD, 0, 2)
    schedule.arrived(Direction.BACKWARD, 0, 0)
    assert take_all(schedule) == ["0I0", "0W0", "0F2"]


def test_a_chunk_leaves_room_for_the_deeper_ones() -> None:
    """Stage 0 of a V of two stages, room for 4: chunk 0 takes 3 places, the last one waits for chunk 1."""
    schedule = driven(0, 2, 8, in_flight_limit=2, chunks=2, placement="v")
    assert take_all(schedule) == ["0F0", "0F1", "0F2"]
    schedule.arrived(Direction.FORWARD, 1, 0)
    assert take_all(schedule) == ["1F0", "1I0", "1W0"]


def test_the_oldest_microbatch_goes_first_in_its_deepest_chunk() -> None:
    schedule = make_schedule(ScheduleSpec(chunks=3), stage=1, stages=2, microbatches=4)
    for chunk, microbatch in ((0, 0), (0, 1), (1, 0), (0, 2), (1, 1)):
        schedule.arrived(Direction.FORWARD, chunk, microbatch)
    assert take_all(schedule) == ["1F0", "0F0", "1F1", "0F1", "0F2"]


def test_the_order_of_a_static_schedule_decides_between_ready_tasks() -> None:
    """Stage 1 of 3 would run 0F0 0F1 0B0 0F2 0B1 ... in 1F1B: a late 0B0 is overtaken, then comes first."""
    schedule = make_schedule(ScheduleSpec(pick="1f1b"), stage=1, stages=3, microbatches=4)
    for microbatch in range(3):
        schedule.arrived(Direction.FORWARD, 0, microbatch)
    assert take_all(schedule) == ["0F0", "0F1", "0F2"]
    schedule.arrived(Direction.FORWARD, 0, 3)
    schedule.arrived(Direction.BACKWARD, 0, 0)
    schedule.arrived(Direction.BACKWARD, 0, 1)
    schedule.arrived(Direction.BACKWARD, 0, 2)
    assert take_all(schedule) == ["0B0", "0B1", "0F3", "0B2"]


# --- layouts


@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from(("loop", "v")))
def test_virtual_stages_have_one_place_each_and_follow_each_other(
    stages: int, chunks: int, placement: ChunkPlacement
) -> None:
    layout = ChunkLayout(stages=stages, chunks=chunks, placement=placement)
    places = [layout.place(v) for v in range(layout.virtual_stages)]
    assert sorted(places) == list(itertools.product(range(stages), range(chunks)))
    assert [layout.virtual(*place) for place in places] == list(range(layout.virtual_stages))
    assert [p for p in places if layout.is_source(*p)] == places[:1]
    assert [p for p in places if layout.is_sink(*p)] == places[-1:]
    for before, after in itertools.pairwise(places):
        assert layout.target(*before, Direction.FORWARD) == after == layout.origin(*before, Direction.BACKWARD)
        assert layout.target(*after, Direction.BACKWARD) == before == layout.origin(*after, Direction.FORWARD)
        # A V turns on a stage; a loop always goes on to the next.
        assert (before[0] == after[0]) == (stages == 1 or (placement == "v" and before[1] != after[1]))
    assert layout.target(*places[-1], Direction.FORWARD) is None
    assert layout.target(*places[0], Direction.BACKWARD) is None


# --- mistakes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            ScheduleSpec(name="1f1"),
            "unknown schedule '1f1'; known are message-driven, message-driven-zero-bubble, gpipe, 1f1b, "
            "interleaved-1f1b, zero-bubble",
        ),
        (ScheduleSpec(name="gpipe", in_flight_limit=2), "'gpipe' has no in_flight_limit"),
        (ScheduleSpec(name="1f1b", pick="forward-first"), "'1f1b' has no .* pick rule"),
        (ScheduleSpec(name="zero-bubble", in_flight_limit=2), "'zero-bubble' has no in_flight_limit"),
        (ScheduleSpec(in_flight_limit=0), "in_flight_limit is 0; it must be at least 1"),
        (ScheduleSpec(chunks=0), "chunks is 0; it must be at least 1"),
        (ScheduleSpec(name="1f1b", chunks=2), "'1f1b' needs one chunk per stage; remove chunks"),
        (ScheduleSpec(name="gpipe", placement="v"), "placement 'v' needs two or more chunks per stage"),
        (ScheduleSpec(name="interleaved-1f1b"), "needs two or more chunks in loops; set chunks: 2, placement: loop"),
        (ScheduleSpec(name="interleaved-1f1b", chunks=2, placement="v"), "needs two or more chunks in loops"),
        (ScheduleSpec(name="zero-bubble", chunks=2), r"needs one chunk \(ZB-H1\) or two in a V .* \(found chunks: 2"),
        (ScheduleSpec(pick="deepest"), "unknown pick rule 'deepest'; known are backward-first, .*, zero-bubble"),
        (ScheduleSpec(pick="1f1b", chunks=2), "pick rule '1f1b' needs one chunk per stage"),
        (ScheduleSpec(pick="zero-bubble"), "are whole, those of pick rule 'zero-bubble' are not; take schedule 'mess"),
        (ScheduleSpec(name=DRIVEN[1], pick="1f1b"), "are split, those of pick rule '1f1b' are not"),
    ],
)
def test_a_wrong_schedule_is_refused(spec: ScheduleSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_schedule(spec, stage=0, stages=2, microbatches=2)


def test_a_stage_outside_the_pipeline_and_an_empty_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="stage 2 is not one of 2 stages"):
        make_schedule(ScheduleSpec(), stage=2, stages=2, microbatches=1)
    with pytest.raises(ValueError, match="at least 1 microbatch, not 0"):
        make_schedule(ScheduleSpec(), stage=0, stages=2, microbatches=0)


@given(st.sampled_from(Kind), st.integers(0, 99), st.integers(0, 9999))
def test_tasks_print_and_parse(kind: Kind, chunk: int, microbatch: int) -> None:
    task = Task(kind, chunk, microbatch)
    assert Task.parse(str(task)) == task


@pytest.mark.parametrize("text", ["", "F", "0F", "F0", "0X1", "0F-1", "0F1B2"])
def test_what_is_not_a_task_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a task"):
        Task.parse(text)
