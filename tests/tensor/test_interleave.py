"""Lanes: whose turn it is, what becomes of failures, and that nothing but the lanes' own calls decides."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axonn.tensor.overdecomposition import Lanes

PATIENCE_S = 60.0
"""After which a test is taken to hang."""


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    made = Lanes()
    yield made
    made.close()


def started_since(before: set[threading.Thread]) -> set[threading.Thread]:
    """Threads that were not there before; one of an earlier test may end at any time."""
    return set(threading.enumerate()) - before


def within_patience(function: Callable[[], Any]) -> Any:
    """The result of a function that must not hang; raises what it raises."""
    result: list[Any] = []
    error: list[BaseException] = []

    def body() -> None:
        try:
            result.append(function())
        except BaseException as caught:
            error.append(caught)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the lanes hang"
    if error:
        raise error[0]
    return result[0]


def turns(lanes: Lanes, switches: list[int]) -> list[int]:
    """The lane of each piece of work, where lane i switches `switches[i]` times."""
    order: list[int] = []

    def body(lane: int) -> None:
        order.append(lane)
        for _ in range(switches[lane]):
            lanes.switch()
            order.append(lane)

    lanes.run([partial(body, lane) for lane in range(len(switches))])
    return order


def round_robin(switches: list[int]) -> list[int]:
    """By the definition: in rounds, each lane that is not done."""
    rounds = range(max(switches) + 1)
    return [lane for number in rounds for lane, count in enumerate(switches) if number <= count]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=5))
def test_turns_go_round_in_order_whatever_the_lanes_do(switches: list[int]) -> None:
    lanes = Lanes()
    expected = round_robin(switches)
    assert [within_patience(partial(turns, lanes, switches)) for _ in range(3)] == [expected] * 3
    lanes.close()


def test_without_switches_lanes_run_one_after_another(lanes: Lanes) -> None:
    assert turns(lanes, [0, 0, 0]) == [0, 1, 2]


def test_only_one_lane_runs_at_a_time(lanes: Lanes) -> None:
    running = 0

    def body() -> int:
        nonlocal running
        most = 0
        for _ in range(20):
            running += 1
            sum(range(2000))  # Long enough for another thread to get the interpreter.
            most = max(most, running)
            running -= 1
            lanes.switch()
        return most

    assert lanes.run([body] * 3) == [1, 1, 1]


def test_results_come_in_the_order_of_the_functions_not_of_their_ends(lanes: Lanes) -> None:
    ended = []

    def body(lane: int) -> str:
        for _ in range(3 - lane):
            lanes.switch()
        ended.append(lane)
        return f"result {lane}"

    assert lanes.run([partial(body, lane) for lane in range(3)]) == ["result 0", "result 1", "result 2"]
    assert ended == [2, 1, 0]


def test_a_lane_knows_its_number_and_the_first_is_the_callers_thread(lanes: Lanes) -> None:
    here = threading.current_thread()
    found = lanes.run([lambda: (lanes.lane, threading.current_thread() is here)] * 3)
    assert found == [(0, True), (1, False), (2, False)]
    assert lanes.lane is None


def test_one_function_is_simply_called(lanes: Lanes) -> None:
    before = set(threading.enumerate())
    assert lanes.run([lambda: lanes.lane]) == [None]
    assert started_since(before) == set()


def test_a_switch_outside_of_lanes_does_nothing(lanes: Lanes) -> None:
    lanes.switch()
    assert lanes.run([lambda: 1, lambda: 2]) == [1, 2]
    lanes.switch()


def test_a_run_inside_of_a_lane_is_part_of_its_turn(lanes: Lanes) -> None:
    order: list[str] = []

    def inner(name: str) -> str:
        order.append(name)
        lanes.switch()
        order.append(name)
        return name

    def outer(lane: int) -> list[str]:
        return lanes.run([partial(inner, f"{lane}a"), partial(inner, f"{lane}b")])

    found = within_patience(lambda: lanes.run([partial(outer, 0), partial(outer, 1)]))
    assert found == [["0a", "0b"], ["1a", "1b"]]
    # Each lane runs its inner functions one after another, and gives its turn away in each.
    assert order == ["0a", "1a", "0a", "0b", "1a", "1b", "0b", "1b"]


@pytest.mark.parametrize(("failing", "after"), list(itertools.product(range(3), range(3))))
def test_a_failure_ends_the_other_lanes_and_is_raised(lanes: Lanes, failing: int, after: int) -> None:
    """Lane `failing` fails after some switches; the others would go on, clean up, and never work again."""
    cleaned, worked_after_failure = [], []
    failed = False

    def body(lane: int) -> None:
        nonlocal failed
        try:
            for number in range(5):
                if lane == failing and number == after:
                    failed = True
                    raise KeyError(f"lane {lane}")
                lanes.switch()
                if failed:
                    worked_after_failure.append(lane)
        finally:
            cleaned.append(lane)

    with pytest.raises(KeyError, match=f"lane {failing}"):
        within_patience(lambda: lanes.run([partial(body, lane) for lane in range(3)]))
    assert worked_after_failure == []
    # A lane that had not begun has nothing to clean up.
    assert sorted(cleaned) == ([lane for lane in range(3) if lane <= failing] if after == 0 else [0, 1, 2])
    assert within_patience(lambda: turns(lanes, [1, 1, 1])) == [0, 1, 2, 0, 1, 2]


def test_the_first_failure_is_the_one_that_is_raised(lanes: Lanes) -> None:
    def body(lane: int) -> None:
        try:
            lanes.switch()
            if lane == 0:
                raise KeyError("the cause")
            lanes.switch()
        except BaseException as error:
            if lane == 0:
                raise
            raise ValueError("a consequence") from error

    with pytest.raises(KeyError, match="the cause"):
        within_patience(lambda: lanes.run([partial(body, lane) for lane in range(2)]))


def test_a_lane_that_catches_everything_does_not_hold_up_a_failure(lanes: Lanes) -> None:
    def stubborn() -> None:
        for _ in range(5):
            try:
                lanes.switch()
            except Exception:
                continue

    def failing() -> None:
        lanes.switch()
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        within_patience(lambda: lanes.run([stubborn, failing]))


@pytest.mark.parametrize("lane", [0, 1])
def test_an_interrupt_is_passed_on(lanes: Lanes, lane: int) -> None:
    def body(mine: int) -> None:
        lanes.switch()
        if mine == lane:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        within_patience(lambda: lanes.run([partial(body, 0), partial(body, 1)]))
    assert turns(lanes, [0, 0]) == [0, 1]


@pytest.mark.parametrize("enabled", [True, False])
def test_whether_gradients_are_recorded_is_as_in_the_caller(lanes: Lanes, enabled: bool) -> None:
    def body() -> tuple[bool, bool]:
        first = torch.is_grad_enabled()
        with torch.set_grad_enabled(not first):
            lanes.switch()
        lanes.switch()
        return first, torch.is_grad_enabled()

    with torch.set_grad_enabled(enabled):
        assert lanes.run([body] * 3) == [(enabled, enabled)] * 3
        assert torch.is_grad_enabled() is enabled


class _Switching(torch.autograd.Function):
    """Gives its lane's turn away in forward and backward, as a layer does that waits for a collective."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, lanes: Lanes, log: list[str], name: str) -> torch.Tensor:
        ctx.rest = lanes, log, name
        log.append(f"forward {name}")
        lanes.switch()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        lanes, log, name = ctx.rest
        log.append(f"backward {name}")
        if name == "failing":
            raise KeyError(name)
        lanes.switch()
        log.append(f"end of {name}")
        return gradient, None, None, None


def switching(lanes: Lanes, log: list[str], name: str) -> torch.Tensor:
    x = torch.ones(2, requires_grad=True)
    y: torch.Tensor = _Switching.apply(x, lanes, log, name)  # type: ignore[no-untyped-call]
    (2 * y).sum().backward()
    assert x.grad is not None
    return x.grad


def test_a_lane_is_suspended_in_the_midst_of_a_backward(lanes: Lanes) -> None:
    log: list[str] = []
    found = within_patience(lambda: lanes.run([partial(switching, lanes, log, name) for name in "ab"]))
    assert torch.equal(torch.stack(found), torch.full((2, 2), 2.0))
    assert log == ["forward a", "forward b", "backward a", "backward b", "end of a", "end of b"]


def test_a_failure_reaches_a_lane_that_is_suspended_in_a_backward(lanes: Lanes) -> None:
    log: list[str] = []
    names = ["a", "failing", "c"]
    with pytest.raises(KeyError, match="failing"):
        within_patience(lambda: lanes.run([partial(switching, lanes, log, name) for name in names]))
    assert log == ["forward a", "forward failing", "forward c", "backward a", "backward failing"]
    log.clear()
    within_patience(lambda: lanes.run([partial(switching, lanes, log, name) for name in "ab"]))
    assert len(log) == 6


def test_threads_are_kept_for_the_next_run_and_end_when_closed(lanes: Lanes) -> None:
    before = set(threading.enumerate())
    turns(lanes, [1, 1, 1])
    kept = started_since(before)
    assert len(kept) == 2
    turns(lanes, [1, 1, 1])
    turns(lanes, [1, 1])
    assert started_since(before) == kept
    lanes.close()
    for thread in kept:
        thread.join(PATIENCE_S)
    assert started_since(before) == set()
    assert turns(lanes, [1, 1]) == [0, 1, 0, 1]


def test_threads_end_with_the_lanes() -> None:
    before = set(threading.enumerate())
    lanes = Lanes()
    lanes.run([lanes.switch, lanes.switch, lanes.switch])
    started = started_since(before)
    assert len(started) == 2
    del lanes
    gc.collect()
    for thread in started:
        thread.join(PATIENCE_S)
    assert started_since(before) == set()
