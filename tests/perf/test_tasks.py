"""Tasks of several lanes with collectives beside computation, against an oracle that moves time step by step."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axonn.perf.timing.task_times import TaskSegment, TaskTime, joined, task_time

SECONDS = st.floats(0, 4).map(lambda x: round(x, 2))
SEGMENTS = st.builds(TaskSegment, SECONDS, SECONDS, SECONDS)
LANES = st.lists(st.lists(SEGMENTS, min_size=1, max_size=5).map(joined), min_size=1, max_size=4)
SLOWDOWN = st.floats(1, 2).map(lambda x: round(x, 2))


def fluid(lanes: Sequence[Sequence[TaskSegment]], slowdown: float) -> float:
    """The same in small steps: one lane computes, at 1 / slowdown while the link carries anything."""
    now, queue = 0.0, list[list[float]]()  # collectives under way: [seconds left]
    results: list[list[float] | None] = [None] * len(lanes)

    def run(seconds: float, *, compute: bool) -> float:
        """Let at most `seconds` of computation (or of waiting) pass up to the next event; what is left."""
        nonlocal now
        busy = bool(queue)
        step = seconds * (slowdown if busy and compute else 1.0)
        if busy:
            step = min(step, queue[0][0])
            queue[0][0] -= step
        now += step
        done = step / (slowdown if busy and compute else 1.0)
        if busy and queue[0][0] <= 1e-12:
            queue.pop(0)[0] = 0.0
        return seconds - done

    for turn in range(max(map(len, lanes))):
        for lane, segments in enumerate(lanes):
            if turn >= len(segments):
                continue
            while results[lane] is not None and any(result is results[lane] for result in queue):
                run(queue[0][0], compute=False)
            for seconds, exchange in ((segments[turn].compute, segments[turn].exchange), (segments[turn].beside, 0.0)):
                left = seconds
                while left > 1e-12:
                    left = run(left, compute=True)
                if exchange:
                    results[lane] = [exchange]
                    queue.append(results[lane])
    while queue:
        run(queue[0][0], compute=False)
    return now


def sums(lanes: Sequence[Sequence[TaskSegment]]) -> tuple[float, float]:
    """(computation, communication)"""
    every = [s for lane in lanes for s in lane]
    return sum(s.compute + s.beside for s in every), sum(s.exchange for s in every)


@given(LANES, SLOWDOWN)
def test_time_passes_as_in_the_oracle(lanes: list[list[TaskSegment]], slowdown: float) -> None:
    assert task_time(lanes, slowdown=slowdown).total == pytest.approx(fluid(lanes, slowdown), abs=1e-8)


@given(LANES, SLOWDOWN)
def test_a_task_takes_at_least_the_longer_and_at_most_both(lanes: list[list[TaskSegment]], slowdown: float) -> None:
    compute, communication = sums(lanes)
    time = task_time(lanes, slowdown=slowdown)
    assert max(compute, communication) - 1e-9 <= time.total <= slowdown * compute + communication + 1e-9
    assert time.total >= task_time(lanes).total - 1e-9
    assert 0 <= time.waited <= communication + 1e-9


@given(LANES, SLOWDOWN)
def test_intervals_account_for_every_second(lanes: list[list[TaskSegment]], slowdown: float) -> None:
    time: TaskTime = task_time(lanes, slowdown=slowdown)
    assert sum(end - start for start, end in time.computing) == pytest.approx(time.total - time.waited, abs=1e-9)
    assert all(a[1] <= b[0] for a, b in zip(time.computing, time.computing[1:], strict=False))
    assert len(time.collectives) == sum(s.exchange > 0 for lane in lanes for s in lane)
    # Each says its lane and turn: turns follow each other, and a collective is issued in its own.
    for turns, intervals in ((time.computed_in, time.computing), (time.issued_in, time.collectives)):
        assert len(turns) == len(intervals)
        assert [(turn, lane) for lane, turn in turns] == sorted((turn, lane) for lane, turn in turns)
    own = {turn: i for turn, i in zip(time.computed_in, time.computing, strict=True)}
    for turn, (issued, _) in zip(time.issued_in, time.collectives, strict=True):
        assert turn not in own or own[turn][0] <= issued <= own[turn][1]
    assert [time.shard(turn) for turn in time.computed_in] == [
        lane if len(lanes) > 1 else -1 for lane, _ in time.computed_in
    ]
    # They follow each other on the link.
    ends = [end for _, end in time.collectives]
    assert ends == sorted(ends)
    assert max([0.0, *ends]) <= time.total


@given(st.lists(SEGMENTS, min_size=1, max_size=6), SLOWDOWN)
@settings(max_examples=50)
def test_one_lane_in_closed_form(segments: list[TaskSegment], slowdown: float) -> None:
    """It waits for what the computation beside does not cover, which itself is slower as long as there is something."""
    lane = joined(segments)
    expected = 0.0
    for compute, exchange, beside in lane:
        covered = beside * slowdown if beside * slowdown <= exchange else beside + exchange * (1 - 1 / slowdown)
        expected += compute + max(exchange, covered)
    assert task_time([lane], slowdown=slowdown).total == pytest.approx(expected)


def layer(lanes: int, *, exchange: float, launch: float) -> list[list[TaskSegment]]:
    """Eight layers, each two products of a second with a collective behind, its rows cut into lanes; each lane pays
    `launch` for a product of any size."""
    return [[TaskSegment(1 / lanes + launch, exchange / lanes)] * 16 for _ in range(lanes)]


@pytest.mark.parametrize("exchange", [0.1, 0.25, 0.5, 1.0])
def test_overdecomposition_hides_collectives_and_costs_launches(exchange: float) -> None:
    def saved(lanes: int, launch: float = 0.0, slowdown: float = 1.0) -> float:
        one = task_time(layer(1, exchange=exchange, launch=launch), slowdown=slowdown).total
        return 1 - task_time(layer(lanes, exchange=exchange, launch=launch), slowdown=slowdown).total / one

    hideable = exchange / (1 + exchange)
    assert 0.8 * hideable < saved(2) < saved(4) < hideable
    assert saved(4, launch=0.02) < saved(2, launch=0.02) < saved(2)
    assert saved(2, slowdown=1.2) < saved(2)
    # Where there is nearly nothing to hide, cutting is a loss.
    assert task_time(layer(2, exchange=0.01, launch=0.02)).total > task_time(layer(1, exchange=0.01, launch=0.02)).total


def gpt_layer(lanes: int, share: float, *, backward: bool) -> list[list[TaskSegment]]:
    """Twelve equal products, three of them queries, keys and values, one projection; `share`: collectives of the whole
    layer over its computation. The gradients of inputs are reduced beside the products that give the weights'."""
    exchange = 36 * share / 4 / lanes
    if not backward:
        one = [TaskSegment(4 / lanes, exchange), TaskSegment(8 / lanes, exchange)]
    else:
        one = [TaskSegment(12 / lanes, exchange, 4 / lanes), TaskSegment(5 / lanes, exchange, 3 / lanes)]
    return [joined(one * 8) for _ in range(lanes)]


@pytest.mark.parametrize(
    ("lanes", "share", "measured"), [(1, 0.25, 0.44), (1, 0.5, 0.39), (2, 0.25, 0.87), (2, 0.5, 0.89)]
)
def test_what_is_hidden_is_what_was_measured(lanes: int, share: float, measured: float) -> None:
    """Of the time of the collectives of a GPT of width 256 on two ranks over an emulated link: `make bench-link`."""
    times = [task_time(gpt_layer(lanes, share, backward=backward)) for backward in (False, True)]
    waited = sum(time.waited for time in times)
    assert 1 - waited / (8 * 36 * share) == pytest.approx(measured, abs=0.12)
