"""The simulator against textbook results, hand-made cases, and the breakdown of its own spans."""

import itertools
import random
from collections.abc import Callable

import pytest

from axonn.errors import ConfigError, DeadlockError
from axonn.perf.machine.network import MessageTime
from axonn.perf.pipeline.simulator import Simulation, simulate
from axonn.schedules import ChunkLayout, Kind, ScheduleSpec, StageSchedule, StaticSchedule, Task, make_schedule
from axonn.spans import breakdown

ZB_V = ScheduleSpec(name="zero-bubble", chunks=2, placement="v")
DRIVEN_V = ScheduleSpec(name="message-driven-zero-bubble", chunks=2, placement="v")
SPECS = [
    ScheduleSpec(in_flight_limit=4),
    ScheduleSpec(in_flight_limit=4, chunks=2),
    ScheduleSpec(in_flight_limit=4, chunks=3, placement="v", pick="forward-first"),
    ScheduleSpec(name="gpipe"),
    ScheduleSpec(name="1f1b"),
    ScheduleSpec(name="interleaved-1f1b", chunks=2),
    ScheduleSpec(name="zero-bubble"),
    ZB_V,
    ScheduleSpec(name="message-driven-zero-bubble", in_flight_limit=4),
    ScheduleSpec(name="message-driven-zero-bubble", in_flight_limit=4, chunks=2, placement="v", pick="zero-bubble"),
    ScheduleSpec(name="message-driven-zero-bubble", in_flight_limit=3, chunks=3),
]


def label(spec: ScheduleSpec) -> str:
    return f"{spec.name}-{spec.chunks}{spec.placement}"


def make_all(spec: ScheduleSpec, stages: int, microbatches: int) -> list[StageSchedule]:
    return [make_schedule(spec, stage=s, stages=stages, microbatches=microbatches) for s in range(stages)]


def even(spec: ScheduleSpec, *seconds: float) -> Callable[[int, Task], float]:
    """Seconds of a stage's F, B, I and W, divided over its chunks; the same on all stages."""
    return lambda stage, task: seconds[task.kind] / spec.chunks


def latency(seconds: float) -> Callable[[int, int], MessageTime]:
    return lambda sender, receiver: MessageTime(seconds, 0.0)


def run_unit(spec: ScheduleSpec, stages: int, microbatches: int, **options: object) -> Simulation:
    """Forward, input half and weight half take one second each."""
    return simulate(make_all(spec, stages, microbatches), seconds=even(spec, 1, 2, 1, 1), **options)


# --- textbook makespans


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 5), (2, 1), (4, 6), (5, 3), (8, 64)])
@pytest.mark.parametrize("blocking", [False, True])
def test_instant_messages_give_the_textbook_makespan(name: str, stages: int, microbatches: int, blocking: bool) -> None:
    spec = ScheduleSpec(name=name)
    run = simulate(make_all(spec, stages, microbatches), seconds=even(spec, 3, 5), blocking=blocking)
    assert run.makespan == (microbatches + stages - 1) * (3 + 5)
    assert run.busy == [microbatches * 8.0] * stages
    assert run.bubble == [(stages - 1) * 8.0] * stages
    assert run.point_to_point == [0.0] * stages


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_interleaving_divides_the_bubble_by_the_chunks(chunks: int, stages: int) -> None:
    """Narayanan et al., SC 2021, section 2.2.2; a last group that is not full costs at most what a full one does."""
    spec = ScheduleSpec(name="interleaved-1f1b", chunks=chunks)
    for microbatches in range(1, 3 * stages + 1):
        run = simulate(make_all(spec, stages, microbatches), seconds=even(spec, 3, 5))
        full = -(-microbatches // stages) * stages
        expected = full * 8 + (stages - 1) * 8 / chunks
        assert run.makespan == pytest.approx(expected) if full == microbatches else run.makespan <= expected + 1e-9


@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (2, 3, 2), (2, 2, 1), (3, 4, 2)])
@pytest.mark.parametrize("stages", [1, 2, 3, 6])
def test_split_backwards_fill_the_bubble_with_weight_halves(stages: int, f: int, i: int, w: int) -> None:
    """ZB-H1: Qi et al., arXiv 2401.10241, table 2 (weight halves no longer than forwards); in the memory of 1F1B."""
    spec = ScheduleSpec(name="zero-bubble")
    for microbatches in (stages, stages + 1, 4 * stages):
        run = simulate(make_all(spec, stages, microbatches), seconds=even(spec, f, 0, i, w))
        assert run.makespan == microbatches * (f + i + w) + (stages - 1) * (f + i - w)
        assert run.most_held == [stages] * stages


@pytest.mark.parametrize("stages", [1, 2, 3, 6])
def test_a_v_has_no_bubble_between_a_stages_first_and_last_task(stages: int) -> None:
    """ZB-V with enough microbatches, all tasks equally long: Qi et al., arXiv 2401.10241, section 6."""
    for microbatches in (2 * stages, 2 * stages + 3):
        run = run_unit(ZB_V, stages, microbatches)
        for stage in range(stages):
            rows = [(start, end) for s, _, start, end in run.tasks if s == stage]
            assert rows[-1][1] - rows[0][0] == 3 * microbatches
        assert run.makespan == 3 * microbatches + (stages - 1) / 2
        assert max(run.most_held) <= 2 * stages


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_no_number_of_microbatches_deadlocks_a_fixed_order(stages: int) -> None:
    for microbatches in range(1, 3 * stages + 2):
        for spec in (ZB_V, ScheduleSpec(name="zero-bubble"), ScheduleSpec(name="interleaved-1f1b", chunks=3)):
            for blocking in (False, True):
                run = run_unit(spec, stages, microbatches, blocking=blocking, message=latency(0.3))
                assert sum(run.busy) == pytest.approx(3 * stages * microbatches)


# --- message-driven zero bubble


@pytest.mark.parametrize("jitter", [0.0, 0.1])
@pytest.mark.parametrize("spec", [s for s in SPECS if s.name == "message-driven-zero-bubble"], ids=label)
def test_a_stage_never_idles_while_a_weight_half_is_pending(spec: ScheduleSpec, jitter: float) -> None:
    rng = random.Random(7)
    stages = make_all(spec, 4, 12)
    run = simulate(stages, seconds=lambda s, t: 1 + jitter * rng.uniform(-1, 1), message=latency(0.4))
    for stage in range(4):
        pending, free = 0, 0.0
        for start, end, task in [(start, end, task) for s, task, start, end in run.tasks if s == stage]:
            assert pending == 0 or start == free, f"stage {stage} idled before {task}"
            pending += (task.kind == Kind.INPUT) - (task.kind == Kind.WEIGHT)
            free = end
        assert run.most_held[stage] <= stages[stage].limit


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.2, 0.5])
def test_two_stages_of_a_driven_v_lose_only_the_way_to_the_second(seconds: float) -> None:
    """The last stage starts half a forward and a message late, and nothing can end earlier than it makes up for."""
    run = run_unit(DRIVEN_V, 2, 8, message=latency(seconds))
    assert run.makespan == pytest.approx(24 + 0.5 + seconds)
    assert run_unit(ZB_V, 2, 8, message=latency(seconds)).makespan >= run.makespan - 1e-9


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.2, 0.5])
def test_in_the_memory_of_zb_v_its_order_as_pick_rule_is_as_fast(seconds: float) -> None:
    driven = ScheduleSpec(name=DRIVEN_V.name, in_flight_limit=2, pick="zero-bubble", chunks=2, placement="v")
    runs = [run_unit(spec, 2, 8, message=latency(seconds)) for spec in (ZB_V, driven)]
    assert runs[1].makespan <= runs[0].makespan + 1e-9
    assert max(runs[1].most_held) <= 4


# --- messages


def test_most_held_is_what_memory_must_hold() -> None:
    def held(spec: ScheduleSpec, microbatches: int = 6) -> list[int]:
        return run_unit(spec, 4, microbatches).most_held

    assert held(ScheduleSpec(name="gpipe")) == [6, 6, 6, 6]
    assert held(ScheduleSpec(name="1f1b")) == [4, 3, 2, 1]
    assert held(ScheduleSpec(name="zero-bubble")) == [4, 4, 4, 4]
    assert held(ScheduleSpec(name="interleaved-1f1b", chunks=2), 8) == [11, 9, 7, 5]
    assert held(ZB_V, 8) == [8, 8, 8, 8]
    driven = held(ScheduleSpec(in_flight_limit=5), 20)
    assert driven[0] == max(driven) == 5


def test_a_message_arrives_after_latency_and_transfer() -> None:
    spec = ScheduleSpec(name="1f1b")
    run = simulate(make_all(spec, 2, 1), seconds=even(spec, 1, 2), message=lambda s, r: MessageTime(0.25, 0.5))
    assert run.makespan == 1 + 0.75 + 1 + 2 + 0.75 + 2
    assert run.point_to_point == [0.75, 0.75]
    # Stage 0 waits for a gradient while stage 1 computes it, stage 1 for the activation and then for the end.
    assert run.bubble == [0.75 + 1 + 2, 1 + 0.75 + 2]


def test_the_turn_of_a_v_takes_no_message() -> None:
    run = run_unit(ScheduleSpec(in_flight_limit=1, chunks=2, placement="v"), 2, 1, message=latency(10), record=True)
    assert [(m.stage, m.receiver, m.chunk, m.sent) for m in run.messages] == [
        (0, 1, 0, 0.5),
        (1, 0, 1, 11.5),
        (0, 1, 1, 23.0),
        (1, 0, 0, 35.0),
    ]
    assert run.makespan == 2 * (1 + 2) + 4 * 10


def test_messages_of_an_edge_follow_each_other() -> None:
    """GPipe on two stages with a slow link: stage 0 runs on at once, the link is busy for one transfer per message."""

    def slow_down(sender: int, receiver: int) -> MessageTime:
        return MessageTime(0.0, 10.0 if sender < receiver else 0.0)

    spec = ScheduleSpec(name="gpipe")
    run = simulate(make_all(spec, 2, 3), seconds=even(spec, 1, 1), message=slow_down)
    starts = [start for stage, task, start, _ in run.tasks if stage == 1 and task.kind == Kind.FORWARD]
    assert starts == [11.0, 21.0, 31.0]


def test_blocking_messages_cost_both_ends_their_time() -> None:
    """In the steady state of 1F1B a stage exchanges with both neighbours once per microbatch, nothing overlaps."""

    def makespan(microbatches: int, blocking: bool) -> float:
        spec = ScheduleSpec(name="1f1b")
        return run_unit(spec, 4, microbatches, message=lambda s, r: MessageTime(0.0, 0.25), blocking=blocking).makespan

    assert makespan(120, True) - makespan(20, True) == pytest.approx(100 * (3 + 2 * 0.25))
    assert makespan(120, False) < makespan(120, True)


def test_a_blocking_sender_waits_for_a_busy_receiver() -> None:
    run = simulate(
        make_all(ScheduleSpec(name="gpipe"), 2, 2),
        seconds=lambda stage, task: 5.0 if (stage, task.kind) == (1, Kind.FORWARD) else 1.0,
        message=lambda sender, receiver: MessageTime(0.0, 1.0 if sender < receiver else 0.0),
        blocking=True,
    )
    tasks = {(stage, str(task)): start for stage, task, start, _ in run.tasks}
    assert tasks[0, "0F1"] == 2.0  # once the first message has arrived
    assert tasks[1, "0F0"] == 2.0
    assert tasks[1, "0F1"] == 8.0  # sent when stage 1 is free at 7


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_the_breakdown_of_the_spans_is_the_simulators_own(spec: ScheduleSpec, blocking: bool) -> None:
    stages = make_all(spec, 4, 9)
    layout = spec.layout(4)
    run = simulate(
        stages,
        seconds=lambda stage, task: (1.0, 2.5, 1.25, 1.0)[task.kind] * (1, 1, 1.5, 1.125)[stage] / (task.chunk + 1),
        message=lambda sender, receiver: MessageTime(0.125 * (1 + sender), 0.25),
        blocking=blocking,
        record=True,
    )
    turns = spec.chunks - 1 if spec.placement == "v" else 0
    assert len(run.messages) == 2 * (layout.virtual_stages - 1 - turns) * 9
    spans = run.spans(first_layers=lambda stage, chunk: 10 * layout.virtual(stage, chunk))
    assert {s.layer for s in spans if s.kind == "forward"} == {10 * v for v in range(layout.virtual_stages)}
    parts = breakdown(spans)
    assert parts.total == pytest.approx(run.makespan)
    assert parts.compute == pytest.approx(sum(run.busy) / 4)
    assert parts.point_to_point == pytest.approx(sum(run.point_to_point) / 4)
    assert parts.point_to_point > 0
    assert parts.bubble == pytest.approx(sum(run.bubble) / 4)
    assert parts.unexplained == pytest.approx(0.0)


# --- mistakes


@pytest.mark.parametrize("blocking", [False, True])
def test_a_deadlock_names_the_stages_and_what_they_wait_for(blocking: bool) -> None:
    orders = [["0F0", "0B0", "0F1", "0B1"], ["0F0", "0F1", "0B0", "0B1"]]
    layout = ChunkLayout(stages=2)
    stuck: list[StageSchedule] = [
        StaticSchedule(stage=s, stages=2, microbatches=2, layout=layout, order=[Task.parse(t) for t in order])
        for s, order in enumerate(orders)
    ]
    with pytest.raises(DeadlockError) as error:
        simulate(stuck, seconds=lambda stage, task: (1, 2)[task.kind], blocking=blocking)
    text = str(error.value)
    assert "stage 0 has finished 0 of 2 backwards and waits for the gradient of microbatch 0 from stage 1" in text
    assert "stage 1 has finished 0 of 2 backwards and waits for the activation of microbatch 1 from stage 0" in text
    assert "stage 1  .   0F0" in text


def test_a_deadlocked_message_driven_stage_says_what_it_needs() -> None:
    layout = ChunkLayout(stages=2)
    stages = make_all(ScheduleSpec(in_flight_limit=2), 2, 2)
    stages[1] = StaticSchedule(stage=1, stages=2, microbatches=2, layout=layout, order=[Task.parse("0F1")])
    with pytest.raises(DeadlockError, match=r"stage 0 .* waits for a gradient from stage 1"):
        simulate(stages, seconds=lambda stage, task: 1.0)


def test_stages_of_a_v_wait_for_both_neighbours_and_for_their_own_chunks() -> None:
    middle = make_schedule(DRIVEN_V, stage=1, stages=3, microbatches=2)
    assert middle.waiting_for() == (
        "an activation from stage 0 or an activation from stage 2 or a gradient from stage 0 or a gradient from stage 2"
    )
    turn = [Task.parse(t) for t in ("1F0", "0F0")]
    stuck = StaticSchedule(stage=1, stages=2, microbatches=1, layout=ZB_V.layout(2), order=turn)
    assert stuck.waiting_for() == "the activation of microbatch 0 from its own chunk 0, to run 1F0"


def test_stages_that_are_not_one_pipeline_are_refused() -> None:
    stages = make_all(ScheduleSpec(name="1f1b"), 3, 2)
    for wrong in ([], stages[:2], stages[::-1], [*stages[:2], make_all(DRIVEN_V, 3, 2)[2]]):
        with pytest.raises(ConfigError, match="the schedules of all stages of one pipeline, in order"):
            simulate(wrong, seconds=lambda stage, task: 1.0)


def test_every_schedule_keeps_its_promises_under_odd_times() -> None:
    for spec, blocking in itertools.product(SPECS, (False, True)):
        rng = random.Random(3)
        stages = make_all(spec, 4, 10)
        run = simulate(
            stages,
            seconds=lambda stage, task, rng=rng: rng.choice((0.0, 0.1, 1.0, 6.0)),
            message=lambda sender, receiver, rng=rng: MessageTime(rng.random(), 2 * rng.random()),
            blocking=blocking,
        )
        assert all(s.done and s.held == 0 for s in stages)
        assert all(most <= s.limit for most, s in zip(run.most_held, stages, strict=True))
        for stage in range(4):
            mine = [(start, end) for s, _, start, end in run.tasks if s == stage]
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(mine))
