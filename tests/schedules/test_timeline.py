"""Timelines and orders of schedules, beside those under goldens/: 4 stages, 6 microbatches, F, I and W take 1 each.

`python -m tests.schedules.test_timeline` writes the goldens anew.
"""

from pathlib import Path

import pytest

from axonn.perf.pipeline.simulator import Simulation, simulate
from axonn.schedules import ScheduleSpec, make_schedule
from axonn.schedules.timeline import timeline, write_orders

GOLDENS = Path(__file__).parents[1] / "goldens"
SPECS = {
    "message-driven": ScheduleSpec(in_flight_limit=4),
    "message-driven-loop": ScheduleSpec(in_flight_limit=4, chunks=2),
    "gpipe": ScheduleSpec(name="gpipe"),
    "1f1b": ScheduleSpec(name="1f1b"),
    "interleaved-1f1b": ScheduleSpec(name="interleaved-1f1b", chunks=2),
    "zb-h1": ScheduleSpec(name="zero-bubble"),
    "zb-v": ScheduleSpec(name="zero-bubble", chunks=2, placement="v"),
    "message-driven-zero-bubble": ScheduleSpec(name="message-driven-zero-bubble", in_flight_limit=4),
    "message-driven-zero-bubble-v": ScheduleSpec(
        name="message-driven-zero-bubble", in_flight_limit=4, chunks=2, placement="v"
    ),
}


def run(name: str) -> Simulation:
    spec = SPECS[name]
    schedules = [make_schedule(spec, stage=stage, stages=4, microbatches=6) for stage in range(4)]
    return simulate(schedules, seconds=lambda stage, task: (1, 2, 1, 1)[task.kind] / spec.chunks)


def drawn(name: str) -> str:
    return timeline(run(name).tasks, slot=1 / SPECS[name].chunks)


@pytest.mark.parametrize("name", SPECS)
def test_golden_timeline(name: str) -> None:
    assert drawn(name) == (GOLDENS / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", SPECS)
def test_golden_orders(name: str) -> None:
    assert write_orders(run(name).orders()) == (GOLDENS / f"{name}.csv").read_text()


def test_no_golden_is_left_over() -> None:
    assert {file.stem for file in GOLDENS.iterdir() if file.is_file()} == set(SPECS)


def test_the_csv_is_what_one_would_write_by_hand() -> None:
    assert write_orders(run("1f1b").orders()).splitlines()[3] == "3,0F0,0B0,0F1,0B1,0F2,0B2,0F3,0B3,0F4,0B4,0F5,0B5"


def test_a_timeline_can_begin_late_and_stop_early() -> None:
    lines = timeline(run("1f1b").tasks, begin=3.0, columns=3).splitlines()
    assert lines[3] == "stage 3  0F0 0B0 ="
    assert lines[2] == "stage 2  0F1 .   ."


if __name__ == "__main__":
    for golden in SPECS:
        (GOLDENS / f"{golden}.txt").write_text(drawn(golden))
        (GOLDENS / f"{golden}.csv").write_text(write_orders(run(golden).orders()))
