"""What a schedule is: a state machine that is told events and answers with the next task.

One object per stage. It never computes, waits, communicates or reads a clock, so the engine (with real messages), the
simulator (with a modelled clock) and the tests (with adversarial message orders) drive the same code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum
from typing import NamedTuple


class Direction(IntEnum):
    """Way a message travels through the pipeline."""

    FORWARD = 0
    """An activation, from the previous stage."""
    BACKWARD = 1
    """A gradient, from the next stage."""


class Kind(IntEnum):
    """What a task computes."""

    FORWARD = 0
    BACKWARD = 1

    @property
    def letter(self) -> str:
        return "FB"[self]


class Task(NamedTuple):
    """One piece of work of a stage. Prints as `2F0`: microbatch 2 is written after the kind, the chunk before it."""

    kind: Kind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.chunk}{self.kind.letter}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Task:
        """Inverse of `str`. Raises `ValueError` when `text` is not a task."""
        for kind in Kind:
            chunk, letter, microbatch = text.strip().partition(kind.letter)
            if letter and chunk.isdigit() and microbatch.isdigit():
                return cls(kind, int(chunk), int(microbatch))
        raise ValueError(f"'{text}' is not a task; a task looks like 0F3 (chunk 0, forward, microbatch 3)")


class StageSchedule(ABC):
    """Decides what one stage runs next.

    The driver calls `arrived` for each message, asks `next_task` whenever the stage is free, and calls `finished` when
    the task has finished on the device. `next_task` may be asked again before an earlier task has finished (a host that
    runs ahead of its device); tasks are executed in the order they were handed out.
    """

    def __init__(self, *, stage: int, stages: int, microbatches: int) -> None:
        if not 0 <= stage < stages:
            raise ValueError(f"stage {stage} is not one of {stages} stages")
        if microbatches < 1:
            raise ValueError(f"a batch has at least 1 microbatch, not {microbatches}")
        self.stage = stage
        self.stages = stages
        self.microbatches = microbatches
        self.first = stage == 0
        self.last = stage == stages - 1
        self.held = 0
        """Microbatches whose forward was handed out and whose backward has not finished."""
        self.backwards_finished = 0

    @abstractmethod
    def arrived(self, direction: Direction, chunk: int, microbatch: int) -> None:
        """A message from a neighbouring stage has arrived."""

    @abstractmethod
    def next_task(self) -> Task | None:
        """The next task, now handed out, or None when the stage has to wait for an event."""

    def finished(self, task: Task) -> None:
        """`task` has finished on the device."""
        if task[0] == Kind.BACKWARD:
            self.held -= 1
            self.backwards_finished += 1

    def waiting_for(self) -> str:
        """What must happen before this stage has a next task, in words for an error message."""
        sides = ([] if self.first else [f"an activation from stage {self.stage - 1}"]) + (
            [] if self.last else [f"a gradient from stage {self.stage + 1}"]
        )
        return " or ".join(sides) or "nothing"

    @property
    def done(self) -> bool:
        """True once every microbatch has run forward and backward here."""
        return self.backwards_finished == self.microbatches

    @property
    @abstractmethod
    def limit(self) -> int:
        """Most microbatches that this stage ever holds at once."""
