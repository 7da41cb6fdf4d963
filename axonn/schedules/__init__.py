"""Pipeline schedules: pure state machines, made by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from axonn.errors import ConfigError
from axonn.schedules.base import Direction, Kind, StageSchedule, Task
from axonn.schedules.message_driven import MessageDriven, PickRule
from axonn.schedules.static import StaticSchedule, gpipe_order, one_f_one_b_order

__all__ = [
    "SCHEDULES",
    "Direction",
    "Kind",
    "MessageDriven",
    "PickRule",
    "ScheduleSpec",
    "StageSchedule",
    "StaticSchedule",
    "Task",
    "make_schedule",
]


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """A schedule by name, with its options.

    `in_flight_limit` (message-driven only) defaults to twice the number of stages: at the published limit, one per
    stage, a stage waits whenever a message takes time (DESIGN section 5).
    """

    name: str = "message-driven"
    in_flight_limit: int | None = None
    pick: PickRule = "backward-first"


def _message_driven(spec: ScheduleSpec, stage: int, stages: int, microbatches: int) -> StageSchedule:
    limit = 2 * stages if spec.in_flight_limit is None else spec.in_flight_limit
    return MessageDriven(stage=stage, stages=stages, microbatches=microbatches, in_flight_limit=limit, pick=spec.pick)


def _gpipe(spec: ScheduleSpec, stage: int, stages: int, microbatches: int) -> StageSchedule:
    return StaticSchedule(stage=stage, stages=stages, microbatches=microbatches, order=gpipe_order(microbatches))


def _one_f_one_b(spec: ScheduleSpec, stage: int, stages: int, microbatches: int) -> StageSchedule:
    order = one_f_one_b_order(stage, stages, microbatches)
    return StaticSchedule(stage=stage, stages=stages, microbatches=microbatches, order=order)


SCHEDULES: dict[str, Callable[[ScheduleSpec, int, int, int], StageSchedule]] = {
    "message-driven": _message_driven,
    "gpipe": _gpipe,
    "1f1b": _one_f_one_b,
}
"""Schedules by name. A new one is one file and one line here."""


def make_schedule(spec: ScheduleSpec, *, stage: int, stages: int, microbatches: int) -> StageSchedule:
    """The schedule of one stage. Raises `ConfigError` for an unknown name or an option the schedule does not have."""
    if spec.name not in SCHEDULES:
        raise ConfigError(f"unknown schedule '{spec.name}'; known are {', '.join(SCHEDULES)}")
    if spec.name != "message-driven" and (spec.in_flight_limit is not None or spec.pick != "backward-first"):
        raise ConfigError(f"schedule '{spec.name}' has no in_flight_limit and no pick rule; remove them")
    if spec.in_flight_limit is not None and spec.in_flight_limit < 1:
        raise ConfigError(f"in_flight_limit is {spec.in_flight_limit}; it must be at least 1")
    return SCHEDULES[spec.name](spec, stage, stages, microbatches)
