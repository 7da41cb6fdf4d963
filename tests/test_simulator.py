"""The simulator against textbook results, hand-made cases, and the breakdown of its own spans."""

import itertools

import pytest

from axonn.errors import ConfigError, DeadlockError
from axonn.perf.network import MessageTime
from axonn.perf.simulator import simulate
from axonn.schedules import Kind, ScheduleSpec, StageSchedule, StaticSchedule, Task, make_schedule
from axonn.trace import breakdown


def schedules(name: str, stages: int, microbatches: int, limit: int | None = None) -> list[StageSchedule]:
    spec = ScheduleSpec(name=name, in_flight_limit=limit)
    return [make_schedule(spec, stage=s, stages=stages, microbatches=microbatches) for s in range(stages)]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 5), (2, 1), (4, 6), (5, 3), (8, 64)])
@pytest.mark.parametrize("blocking", [False, True])
def test_instant_messages_give_the_textbook_makespan(name: str, stages: int, microbatches: int, blocking: bool) -> None:
    run = simulate(
        schedules(name, stages, microbatches), forward=[3.0] * stages, backward=[5.0] * stages, blocking=blocking
    )
    assert run.makespan == (microbatches + stages - 1) * (3 + 5)
    assert run.busy == [microbatches * 8.0] * stages
    assert run.bubble == [(stages - 1) * 8.0] * stages
    assert run.point_to_point == [0.0] * stages


def test_most_held_is_what_memory_must_hold() -> None:
    assert simulate(schedules("gpipe", 4, 6), forward=[1] * 4, backward=[2] * 4).most_held == [6, 6, 6, 6]
    assert simulate(schedules("1f1b", 4, 6), forward=[1] * 4, backward=[2] * 4).most_held == [4, 3, 2, 1]
    driven = simulate(schedules("message-driven", 4, 20, 5), forward=[1] * 4, backward=[2] * 4)
    assert driven.most_held[0] == 5
    assert max(driven.most_held) == 5


def test_a_message_arrives_after_latency_and_transfer() -> None:
    way = [MessageTime(0.25, 0.5)]
    run = simulate(
        schedules("1f1b", 2, 1), forward=[1, 1], backward=[2, 2], messages_forward=way, messages_backward=way
    )
    assert run.makespan == 1 + 0.75 + 1 + 2 + 0.75 + 2
    assert run.point_to_point == [0.75, 0.75]
    # Stage 0 waits for a gradient while stage 1 computes it, stage 1 for the activation and then for the end.
    assert run.bubble == [0.75 + 1 + 2, 1 + 0.75 + 2]


def test_messages_of_an_edge_follow_each_other() -> None:
    """GPipe on two stages with a slow link: stage 0 runs on at once, the link is busy for one transfer per message."""
    way = [MessageTime(0.0, 10.0)]
    run = simulate(schedules("gpipe", 2, 3), forward=[1, 1], backward=[1, 1], messages_forward=way)
    starts = [start for stage, task, start, _ in run.tasks if stage == 1 and task.kind == Kind.FORWARD]
    assert starts == [11.0, 21.0, 31.0]


def test_blocking_messages_cost_both_ends_their_time() -> None:
    """In the steady state of 1F1B a stage exchanges with both neighbours once per microbatch, nothing overlaps."""
    way = [MessageTime(0.0, 0.25)] * 3

    def makespan(microbatches: int, blocking: bool) -> float:
        return simulate(
            schedules("1f1b", 4, microbatches),
            forward=[1] * 4,
            backward=[2] * 4,
            messages_forward=way,
            messages_backward=way,
            blocking=blocking,
        ).makespan

    assert makespan(120, True) - makespan(20, True) == pytest.approx(100 * (3 + 2 * 0.25))
    assert makespan(120, False) < makespan(120, True)


def test_a_blocking_sender_waits_for_a_busy_receiver() -> None:
    run = simulate(
        schedules("gpipe", 2, 2),
        forward=[1, 5],
        backward=[1, 1],
        messages_forward=[MessageTime(0.0, 1.0)],
        messages_backward=[MessageTime(0.0, 0.0)],
        blocking=True,
    )
    tasks = {(stage, str(task)): start for stage, task, start, _ in run.tasks}
    assert tasks[0, "0F1"] == 2.0  # once the first message has arrived
    assert tasks[1, "0F0"] == 2.0
    assert tasks[1, "0F1"] == 8.0  # sent when stage 1 is free at 7


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("name", ["message-driven", "gpipe", "1f1b"])
def test_the_breakdown_of_the_spans_is_the_simulators_own(name: str, blocking: bool) -> None:
    way = [MessageTime(0.125, 0.25)] * 3
    run = simulate(
        schedules(name, 4, 9, 4 if name == "message-driven" else None),
        forward=[1.0, 1.0, 1.5, 1.0],
        backward=[2.0, 2.5, 2.0, 3.0],
        messages_forward=way,
        messages_backward=way,
        blocking=blocking,
        record=True,
    )
    assert len(run.messages) == 2 * 3 * 9
    parts = breakdown(run.spans(), peer_of=run.peers())
    assert parts.total == pytest.approx(run.makespan)
    assert parts.compute == pytest.approx(sum(run.busy) / 4)
    assert parts.point_to_point == pytest.approx(sum(run.point_to_point) / 4)
    assert parts.bubble == pytest.approx(sum(run.bubble) / 4)
    assert parts.unexplained == pytest.approx(0.0)


@pytest.mark.parametrize("blocking", [False, True])
def test_a_deadlock_names_the_stages_and_what_they_wait_for(blocking: bool) -> None:
    def task(text: str) -> Task:
        return Task.parse(text)

    orders = [["0F0", "0B0", "0F1", "0B1"], ["0F0", "0F1", "0B0", "0B1"]]
    stuck: list[StageSchedule] = [
        StaticSchedule(stage=s, stages=2, microbatches=2, order=[task(t) for t in order])
        for s, order in enumerate(orders)
    ]
    with pytest.raises(DeadlockError) as error:
        simulate(stuck, forward=[1, 1], backward=[2, 2], blocking=blocking)
    text = str(error.value)
    assert "stage 0 has finished 0 of 2 microbatches and waits for the gradient of microbatch 0 from stage 1" in text
    assert "stage 1 has finished 0 of 2 microbatches and waits for the activation of microbatch 1 from stage 0" in text
    assert "stage 1  .   0F0" in text


def test_a_deadlocked_message_driven_stage_says_what_it_needs() -> None:
    stages = schedules("message-driven", 2, 2, 2)
    stages[1] = StaticSchedule(stage=1, stages=2, microbatches=2, order=[Task.parse("0F1")])
    with pytest.raises(DeadlockError, match=r"stage 0 .* waits for a gradient from stage 1"):
        simulate(stages, forward=[1, 1], backward=[1, 1])


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 stages need 2 forward"):
        simulate(schedules("1f1b", 2, 2), forward=[1], backward=[1, 1])


def test_every_schedule_keeps_its_promises_under_odd_times() -> None:
    for name, blocking, limit in itertools.product(("message-driven", "gpipe", "1f1b"), (False, True), (1, 3, 50)):
        way = [MessageTime(0.01, 0.7), MessageTime(0.3, 0.1), MessageTime(0.0, 2.0)]
        stages = schedules(name, 4, 12, limit if name == "message-driven" else None)
        run = simulate(
            stages,
            forward=[1, 0.2, 3, 0.7],
            backward=[2, 0.1, 0.4, 6],
            messages_forward=way,
            messages_backward=way[::-1],
            blocking=blocking,
        )
        assert all(s.done and s.held == 0 for s in stages)
        assert all(most <= s.limit for most, s in zip(run.most_held, stages, strict=True))
        for stage in range(4):
            mine = [(start, end) for s, _, start, end in run.tasks if s == stage]
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(mine))
