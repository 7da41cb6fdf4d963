"""Schedules under adversarial message orders: any order that keeps each edge and direction first in, first out."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axonn.errors import ConfigError
from axonn.schedules import (
    SCHEDULES,
    Direction,
    Kind,
    MessageDriven,
    PickRule,
    ScheduleSpec,
    StageSchedule,
    StaticSchedule,
    Task,
    make_schedule,
)

PICKS: tuple[PickRule, ...] = ("backward-first", "forward-first", "arrival-order")


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
        self.wires = {(stage, direction): deque[int]() for stage in stages for direction in Direction}
        self.arrived: list[set[tuple[Direction, int]]] = [set() for _ in stages]
        self.waits = [False] * len(schedules)
        self.executed: list[list[Task]] = [[] for _ in stages]
        self.most_held = [0] * len(schedules)
        self.slowness = {(what, stage): rng.choice((1, 1, 20)) for what in ("host", "device", 0, 1) for stage in stages}

    def run(self) -> None:
        while choices := self._choices():
            weights = [1 / self.slowness[choice] for choice in choices]
            what, stage = self.rng.choices(choices, weights)[0]
            if what == "host":
                self._ask(stage)
            elif what == "device":
                self._finish(stage)
            else:
                self._deliver(stage, Direction(what))
            self._check()
        waiting = {stage: s.waiting_for() for stage, s in enumerate(self.schedules) if not s.done}
        assert not waiting, f"deadlock: {waiting}"

    def _choices(self) -> list[tuple[object, int]]:
        choices: list[tuple[object, int]] = [(direction, s) for (s, direction), wire in self.wires.items() if wire]
        for stage, tasks in enumerate(self.handed):
            if tasks:
                choices.append(("device", stage))
            if len(tasks) <= self.ahead and not self.waits[stage]:
                choices.append(("host", stage))
        return choices

    def _ask(self, stage: int) -> None:
        task = self.schedules[stage].next_task()
        if task is None:
            self.waits[stage] = True  # until something happens to this stage
            return
        self.handed[stage].append(task)

    def _finish(self, stage: int) -> None:
        task = self.handed[stage].popleft()
        schedule = self.schedules[stage]
        forward = task.kind == Kind.FORWARD
        if forward and not schedule.first:
            assert (Direction.FORWARD, task.microbatch) in self.arrived[stage], f"{task} ran without its input"
        if not forward:
            assert Task(Kind.FORWARD, 0, task.microbatch) in self.executed[stage], f"{task} ran before its forward"
            assert schedule.last or (Direction.BACKWARD, task.microbatch) in self.arrived[stage]
        self.executed[stage].append(task)
        schedule.finished(task)
        self.waits[stage] = False
        peer = stage + (1 if forward else -1)
        if 0 <= peer < len(self.schedules):
            self.wires[peer, Direction(task.kind)].append(task.microbatch)

    def _deliver(self, stage: int, direction: Direction) -> None:
        microbatch = self.wires[stage, direction].popleft()
        self.arrived[stage].add((direction, microbatch))
        self.schedules[stage].arrived(direction, 0, microbatch)
        self.waits[stage] = False

    def _check(self) -> None:
        for stage, schedule in enumerate(self.schedules):
            # On the device: forwards that have started and whose backward has not finished.
            started = [*self.executed[stage], *list(self.handed[stage])[:1]]
            held = sum(t.kind == Kind.FORWARD for t in started) - sum(
                t.kind == Kind.BACKWARD for t in self.executed[stage]
            )
            self.most_held[stage] = max(self.most_held[stage], held)
            assert held <= schedule.limit
            assert schedule.held >= held
            if self.ahead == 0 or isinstance(schedule, MessageDriven):
                # A fixed order that is read ahead hands out its next forward before the backward ahead of it is done.
                assert schedule.held <= schedule.limit


@st.composite
def specs(draw: st.DrawFn) -> ScheduleSpec:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    if name != "message-driven":
        return ScheduleSpec(name=name)
    return ScheduleSpec(
        name=name, in_flight_limit=draw(st.none() | st.integers(1, 10)), pick=draw(st.sampled_from(PICKS))
    )


@settings(max_examples=300)
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
    schedules = [make_schedule(spec, stage=s, stages=stages, microbatches=microbatches) for s in range(stages)]
    driver = Driver(schedules, ahead=ahead, rng=random.Random(seed))
    driver.run()
    for stage, schedule in enumerate(schedules):
        executed = driver.executed[stage]
        assert sorted(executed) == [Task(kind, 0, m) for kind in Kind for m in range(microbatches)]
        for kind in Kind:
            assert [t.microbatch for t in executed if t.kind == kind] == list(range(microbatches))
        assert schedule.done
        assert schedule.held == 0
        assert schedule.next_task() is None
        most = expected_limit(spec, stage, stages, microbatches)
        assert schedule.limit == most
        assert driver.most_held[stage] <= most
    assert not any(driver.wires.values())


def expected_limit(spec: ScheduleSpec, stage: int, stages: int, microbatches: int) -> int:
    if spec.name == "gpipe":
        return microbatches
    if spec.name == "1f1b":
        return min(microbatches, stages - stage)
    return min(microbatches, spec.in_flight_limit or 2 * stages)


def test_the_driver_finds_a_deadlock() -> None:
    """The property test can fail: two fixed orders that wait for each other are a deadlock in every order."""
    texts = [["0F0", "0B0", "0F1", "0B1"], ["0F0", "0F1", "0B0", "0B1"]]
    stuck: list[StageSchedule] = [
        StaticSchedule(stage=s, stages=2, microbatches=2, order=[Task.parse(t) for t in order])
        for s, order in enumerate(texts)
    ]
    with pytest.raises(AssertionError, match=r"deadlock: \{0: 'the gradient of microbatch 0.*1: 'the activation of mi"):
        Driver(stuck, ahead=0, rng=random.Random(0)).run()


# --- message-driven


def message_driven(stage: int, stages: int, microbatches: int, limit: int, pick: PickRule) -> MessageDriven:
    return MessageDriven(stage=stage, stages=stages, microbatches=microbatches, in_flight_limit=limit, pick=pick)


def take_all(schedule: StageSchedule) -> list[str]:
    """Run tasks until the schedule waits."""
    tasks = []
    while (task := schedule.next_task()) is not None:
        tasks.append(str(task))
        schedule.finished(task)
    return tasks


@pytest.mark.parametrize("pick", PICKS)
def test_the_first_stage_starts_as_many_forwards_as_the_limit_and_one_per_finished_backward(pick: PickRule) -> None:
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
def test_a_single_stage_runs_without_messages(pick: PickRule) -> None:
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
def test_the_pick_rule_decides_between_ready_tasks(pick: PickRule, order: list[str]) -> None:
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
def test_on_the_first_stage_an_injection_counts_as_a_ready_forward(pick: PickRule, order: list[str]) -> None:
    schedule = message_driven(0, 2, 4, 3, pick)
    first = schedule.next_task()
    assert first is not None
    schedule.finished(first)
    schedule.arrived(Direction.BACKWARD, 0, 0)
    assert take_all(schedule) == order


def test_the_default_limit_is_twice_the_stages() -> None:
    assert make_schedule(ScheduleSpec(), stage=0, stages=3, microbatches=20).limit == 6


# --- mistakes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ScheduleSpec(name="1f1"), "unknown schedule '1f1'; known are message-driven, gpipe, 1f1b"),
        (ScheduleSpec(name="gpipe", in_flight_limit=2), "'gpipe' has no in_flight_limit"),
        (ScheduleSpec(name="1f1b", pick="forward-first"), "'1f1b' has no .* pick rule"),
        (ScheduleSpec(in_flight_limit=0), "in_flight_limit is 0; it must be at least 1"),
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
