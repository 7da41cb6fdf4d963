"""Pipeline schedules: pure state machines, made by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from axonn.errors import ConfigError
from axonn.schedules.base import Direction, Kind, StageSchedule, Task
from axonn.schedules.follower import FollowerSchedule
from axonn.schedules.forward_only import Forwards
from axonn.schedules.layout import ChunkLayout, ChunkPlacement
from axonn.schedules.message_driven import PICKS, MessageDriven
from axonn.schedules.orders import GPIPE, INTERLEAVED, ONE_F_ONE_B, ZERO_BUBBLE, StaticOrder
from axonn.schedules.static import StaticSchedule

__all__ = [
    "DRIVEN",
    "PICKS",
    "STATIC",
    "ChunkLayout",
    "ChunkPlacement",
    "Direction",
    "Forwards",
    "Kind",
    "MessageDriven",
    "ScheduleSpec",
    "StageSchedule",
    "StaticOrder",
    "StaticSchedule",
    "Task",
    "FollowerSchedule",
    "make_schedule",
    "names",
]


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """A schedule by name, with its options.

    `in_flight_limit` and `pick` are those of the message-driven schedules. The limit defaults to twice the number of
    stages: at the published limit, one per stage, a stage waits whenever a message takes time (DESIGN section 5). With
    split backwards it limits the activations that a stage holds, in whole microbatches (`MessageDriven`). `pick` says
    which of several ready tasks runs; with the name of a static schedule it is the one that comes first in its order.
    """

    name: str = "message-driven"
    in_flight_limit: int | None = None
    pick: str = "backward-first"
    chunks: int = 1
    placement: ChunkPlacement = "loop"

    def layout(self, stages: int) -> ChunkLayout:
        """Where this schedule's chunks lie on so many stages."""
        return ChunkLayout(stages=stages, chunks=self.chunks, placement=self.placement)


def _message_driven(spec: ScheduleSpec, stage: int, stages: int, microbatches: int) -> StageSchedule:
    return _driven(spec, stage, stages, microbatches, splits=False)


def _message_driven_zero_bubble(spec: ScheduleSpec, stage: int, stages: int, microbatches: int) -> StageSchedule:
    return _driven(spec, stage, stages, microbatches, splits=True)


def _driven(spec: ScheduleSpec, stage: int, stages: int, microbatches: int, *, splits: bool) -> MessageDriven:
    pick: str | list[Task] = spec.pick
    if spec.pick in STATIC:
        static = ScheduleSpec(name=spec.pick, chunks=spec.chunks, placement=spec.placement)
        pick = _check_static(static, f"pick rule '{spec.pick}'").make(stage, stages, microbatches, spec.chunks)
        if splits != any(task.kind == Kind.INPUT for task in pick):
            other = "message-driven" if splits else "message-driven-zero-bubble"
            raise ConfigError(
                f"the backwards of schedule '{spec.name}' are {'split' if splits else 'whole'}, those of pick rule "
                f"'{spec.pick}' are not; take schedule '{other}' or another pick rule"
            )
    elif spec.pick not in PICKS:
        raise ConfigError(f"unknown pick rule '{spec.pick}'; known are {', '.join((*PICKS, *STATIC))}")
    if spec.in_flight_limit is not None and spec.in_flight_limit < 1:
        raise ConfigError(f"in_flight_limit is {spec.in_flight_limit}; it must be at least 1")
    return MessageDriven(
        stage=stage,
        stages=stages,
        microbatches=microbatches,
        layout=spec.layout(stages),
        in_flight_limit=2 * stages if spec.in_flight_limit is None else spec.in_flight_limit,
        pick=pick,
        splits_backward=splits,
    )


def _static(spec: ScheduleSpec, stage: int, stages: int, microbatches: int) -> StageSchedule:
    if spec.in_flight_limit is not None or spec.pick != "backward-first":
        raise ConfigError(f"schedule '{spec.name}' has no in_flight_limit and no pick rule; remove them")
    order = _check_static(spec, f"schedule '{spec.name}'")
    return StaticSchedule(
        stage=stage,
        stages=stages,
        microbatches=microbatches,
        layout=spec.layout(stages),
        order=order.make(stage, stages, microbatches, spec.chunks),
    )


def _check_static(spec: ScheduleSpec, what: str) -> StaticOrder:
    """The order `spec.name`, if there is one for the chunks and their placement."""
    order, chunks, placement = STATIC[spec.name], spec.chunks, spec.placement
    if not order.fits(chunks, placement):
        raise ConfigError(f"{what} needs {order.needs} (found chunks: {chunks}, placement: {placement})")
    return order


STATIC: dict[str, StaticOrder] = {
    "gpipe": GPIPE,
    "1f1b": ONE_F_ONE_B,
    "interleaved-1f1b": INTERLEAVED,
    "zero-bubble": ZERO_BUBBLE,
}
"""Schedules whose order is fixed in advance, by name. A new one is one file and one line here."""
DRIVEN: dict[str, Callable[[ScheduleSpec, int, int, int], StageSchedule]] = {
    "message-driven": _message_driven,
    "message-driven-zero-bubble": _message_driven_zero_bubble,
}
"""Schedules that decide as messages arrive; a new one likewise."""


def names() -> list[str]:
    """Of all schedules."""
    return [*DRIVEN, *STATIC]


def make_schedule(spec: ScheduleSpec, *, stage: int, stages: int, microbatches: int) -> StageSchedule:
    """The schedule of one stage. Raises `ConfigError` for an unknown name or an option the schedule does not have."""
    if spec.name not in names():
        raise ConfigError(f"unknown schedule '{spec.name}'; known are {', '.join(names())}")
    if spec.chunks < 1:
        raise ConfigError(f"chunks is {spec.chunks}; it must be at least 1")
    if spec.placement == "v" and spec.chunks == 1:
        raise ConfigError("placement 'v' needs two or more chunks per stage; set chunks: 2 or remove placement")
    make = DRIVEN.get(spec.name, _static)
    return make(spec, stage, stages, microbatches)
