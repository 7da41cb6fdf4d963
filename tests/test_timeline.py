"""Timelines and orders of schedules: goldens at 4 stages and 6 microbatches, forward 1, backward 2."""

import pytest

from axonn.errors import ConfigError
from axonn.perf.simulator import Simulation, simulate
from axonn.schedules import ScheduleSpec, make_schedule
from axonn.schedules.timeline import read_orders, timeline, write_orders

GOLDEN = {
    "message-driven": """\
stage 0  0F0 0F1 0F2 0F3 .   .   .   .   .   .   0B0 =   0F4 0B1 =   0F5 0B2 =   .   0B3 =   .   0B4 =   .   0B5 =
stage 1  .   0F0 0F1 0F2 0F3 .   .   .   0B0 =   .   0B1 =   0F4 0B2 =   0F5 0B3 =   .   0B4 =   .   0B5 =   .   .
stage 2  .   .   0F0 0F1 0F2 0F3 0B0 =   .   0B1 =   .   0B2 =   0F4 0B3 =   0F5 0B4 =   .   0B5 =   .   .   .   .
stage 3  .   .   .   0F0 0B0 =   0F1 0B1 =   0F2 0B2 =   0F3 0B3 =   0F4 0B4 =   0F5 0B5 =   .   .   .   .   .   .
""",
    "gpipe": """\
stage 0  0F0 0F1 0F2 0F3 0F4 0F5 .   .   .   .   .   .   .   .   .   0B0 =   0B1 =   0B2 =   0B3 =   0B4 =   0B5 =
stage 1  .   0F0 0F1 0F2 0F3 0F4 0F5 .   .   .   .   .   .   0B0 =   0B1 =   0B2 =   0B3 =   0B4 =   0B5 =   .   .
stage 2  .   .   0F0 0F1 0F2 0F3 0F4 0F5 .   .   .   0B0 =   0B1 =   0B2 =   0B3 =   0B4 =   0B5 =   .   .   .   .
stage 3  .   .   .   0F0 0F1 0F2 0F3 0F4 0F5 0B0 =   0B1 =   0B2 =   0B3 =   0B4 =   0B5 =   .   .   .   .   .   .
""",
    "1f1b": """\
stage 0  0F0 0F1 0F2 0F3 .   .   .   .   .   .   0B0 =   0F4 0B1 =   0F5 0B2 =   .   0B3 =   .   0B4 =   .   0B5 =
stage 1  .   0F0 0F1 0F2 .   .   .   .   0B0 =   0F3 0B1 =   0F4 0B2 =   0F5 0B3 =   .   0B4 =   .   0B5 =   .   .
stage 2  .   .   0F0 0F1 .   .   0B0 =   0F2 0B1 =   0F3 0B2 =   0F4 0B3 =   0F5 0B4 =   .   0B5 =   .   .   .   .
stage 3  .   .   .   0F0 0B0 =   0F1 0B1 =   0F2 0B2 =   0F3 0B3 =   0F4 0B4 =   0F5 0B5 =   .   .   .   .   .   .
""",
}


def run(name: str) -> Simulation:
    spec = ScheduleSpec(name=name, in_flight_limit=4 if name == "message-driven" else None)
    schedules = [make_schedule(spec, stage=stage, stages=4, microbatches=6) for stage in range(4)]
    return simulate(schedules, forward=[1.0] * 4, backward=[2.0] * 4)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_timeline(name: str) -> None:
    assert timeline(run(name).tasks) == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_orders_survive_the_round_trip(name: str) -> None:
    orders = run(name).orders()
    text = write_orders(orders)
    assert read_orders(text) == orders
    assert write_orders(read_orders(text)) == text


def test_the_csv_is_what_one_would_write_by_hand() -> None:
    assert write_orders(run("1f1b").orders()).splitlines()[3] == "3,0F0,0B0,0F1,0B1,0F2,0B2,0F3,0B3,0F4,0B4,0F5,0B5"


@pytest.mark.parametrize(
    ("text", "message"), [("0,0F0,0X1\n", "line 1: '0X1' is not a task"), ("0,0F0\n2,0F0\n", "line 2: .*stage 1")]
)
def test_a_damaged_csv_names_the_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_orders(text)


def test_a_timeline_can_begin_late_and_stop_early() -> None:
    lines = timeline(run("1f1b").tasks, begin=3.0, columns=3).splitlines()
    assert lines[3] == "stage 3  0F0 0B0 ="
    assert lines[2] == "stage 2  0F1 .   ."
