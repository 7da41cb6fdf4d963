"""A schedule as the registry has it: how it is made, and what a planner asks of it before it runs anything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from axonn.schedules.base import StageSchedule
from axonn.schedules.spec import ScheduleSpec


@dataclass(frozen=True, kw_only=True)
class ScheduleDefinition(ABC):
    """A schedule of the registry, with closed forms of its pipelines.

    A closed form is a function of (spec, stages, microbatches). Where it is None, the planner asks the state machines
    instead, or runs them.
    """

    most_held: Callable[[ScheduleSpec, int, int], list[int]] | None = None
    """The most microbatches that each stage can hold, in any order of arriving messages. A microbatch that all chunks
    of a stage hold counts as one."""
    in_flight: Callable[[ScheduleSpec, int, int], float] | None = None
    """Microbatches that can be in flight at once in the pipeline."""
    weights_in_bubble: Callable[[ScheduleSpec], int] | None = None
    """Weight halves that run on each stage while the pipeline fills or drains, in microbatches; 0 where backwards are
    whole."""
    has_limit: bool = False
    """Whether `in_flight_limit` is an option of it."""

    @abstractmethod
    def variants(self, name: str, stages: int) -> Sequence[ScheduleSpec]:
        """Return what a planner tries of it under this name; nothing where another schedule is always as good."""


@dataclass(frozen=True, kw_only=True)
class DrivenSchedule(ScheduleDefinition):
    """A schedule that decides as messages arrive."""

    make: Callable[[ScheduleSpec, int, int, int], StageSchedule]
    """The schedule of a stage, of (spec, stage, stages, microbatches)."""
    tried: Callable[[int], Sequence[ScheduleSpec]] | None = None
    """Variants on so many stages; None: only the one without options."""

    def variants(self, name: str, stages: int) -> Sequence[ScheduleSpec]:
        return [ScheduleSpec(name=name)] if self.tried is None else self.tried(stages)
