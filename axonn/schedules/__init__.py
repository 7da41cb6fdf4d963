"""Pipeline schedules: pure state machines, made by name."""

from __future__ import annotations

from functools import partial

from axonn.errors import ConfigError
from axonn.schedules.base import Direction, Kind, StageSchedule, Task
from axonn.schedules.definition import DrivenSchedule, ScheduleDefinition
from axonn.schedules.follower import FollowerSchedule
from axonn.schedules.forward_only import Forwards
from axonn.schedules.layout import ChunkLayout, ChunkPlacement
from axonn.schedules.message_driven import PICKS, MessageDriven
from axonn.schedules.orders import GPIPE, INTERLEAVED, ONE_F_ONE_B, ZERO_BUBBLE, StaticOrder
from axonn.schedules.spec import ScheduleSpec
from axonn.schedules.static import StaticSchedule

__all__ = [
    "DRIVEN",
    "PICKS",
    "STATIC",
    "ChunkLayout",
    "ChunkPlacement",
    "Direction",
    "DrivenSchedule",
    "FollowerSchedule",
    "Forwards",
    "Kind",
    "MessageDriven",
    "ScheduleDefinition",
    "ScheduleSpec",
    "StageSchedule",
    "StaticOrder",
    "StaticSchedule",
    "Task",
    "definition_of",
    "make_schedule",
    "names",
    "variants",
]


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
        in_flight_limit=spec.limit_on(stages),
        pick=pick,
        splits_backward=splits,
    )


def _held_with_whole_backwards(spec: ScheduleSpec, stages: int, microbatches: int) -> list[int]:
    limit = min(microbatches, spec.limit_on(stages))
    # With one chunk the last stage runs each backward right after its forward.
    return [limit] * (stages - 1) + [1 if spec.chunks == 1 else limit]


def _zero_bubble_variants(stages: int) -> list[ScheduleSpec]:
    name = "message-driven-zero-bubble"
    return [
        ScheduleSpec(name=name, in_flight_limit=stages),
        ScheduleSpec(name=name),
        ScheduleSpec(name=name, chunks=2, placement="v", in_flight_limit=stages),
    ]


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
DRIVEN: dict[str, DrivenSchedule] = {
    "message-driven": DrivenSchedule(
        make=partial(_driven, splits=False),
        most_held=_held_with_whole_backwards,
        in_flight=lambda spec, stages, microbatches: min(spec.limit_on(stages), microbatches),
        weights_in_bubble=lambda spec: 0,
        has_limit=True,
    ),
    "message-driven-zero-bubble": DrivenSchedule(
        make=partial(_driven, splits=True),
        tried=_zero_bubble_variants,
        most_held=lambda spec, stages, microbatches: [min(microbatches, spec.limit_on(stages))] * stages,
        # A microbatch holds its chunks one after the other.
        in_flight=lambda spec, stages, microbatches: min(
            2 * spec.chunks * spec.limit_on(stages) / (spec.chunks + 1), microbatches
        ),
        weights_in_bubble=lambda spec: 2,
        has_limit=True,
    ),
}
"""Schedules that decide as messages arrive; a new one likewise."""


def names() -> list[str]:
    """Of all schedules."""
    return [*DRIVEN, *STATIC]


def definition_of(name: str) -> ScheduleDefinition:
    """Return the definition of the schedule `name`. Raises `ConfigError` where there is none."""
    if name not in names():
        raise ConfigError(f"unknown schedule '{name}'; known are {', '.join(names())}")
    return DRIVEN.get(name) or STATIC[name]


def variants(stages: int) -> list[ScheduleSpec]:
    """Return what a planner tries on so many stages, the default first."""
    tried = [spec for name in (*STATIC, *DRIVEN) for spec in definition_of(name).variants(name, stages)]
    return list(dict.fromkeys([ScheduleSpec(), *tried]))


def make_schedule(spec: ScheduleSpec, *, stage: int, stages: int, microbatches: int) -> StageSchedule:
    """The schedule of one stage. Raises `ConfigError` for an unknown name or an option the schedule does not have."""
    definition = definition_of(spec.name)
    if spec.chunks < 1:
        raise ConfigError(f"chunks is {spec.chunks}; it must be at least 1")
    if spec.placement == "v" and spec.chunks == 1:
        raise ConfigError("placement 'v' needs two or more chunks per stage; set chunks: 2 or remove placement")
    make = definition.make if isinstance(definition, DrivenSchedule) else _static
    return make(spec, stage, stages, microbatches)
