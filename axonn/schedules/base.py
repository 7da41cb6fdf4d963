"""What a schedule is: a state machine that is told events and answers with the next task.

One object per stage. It never computes, waits, communicates or reads a clock, so the engine (with real messages), the
simulator (with a modelled clock) and the tests (with adversarial message orders) drive the same code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from axonn.schedules.layout import ChunkLayout


class Direction(IntEnum):
    """Way a message travels through the pipeline."""

    FORWARD = 0
    """An activation, from the previous virtual stage."""
    BACKWARD = 1
    """A gradient, from the next virtual stage."""


class Kind(IntEnum):
    """What a task computes."""

    FORWARD = 0
    BACKWARD = 1
    """The whole backward: gradients of the input and of the weights."""
    INPUT = 2
    """The first half of a split backward: the gradient of the input, which the previous virtual stage waits for."""
    WEIGHT = 3
    """The second half: the gradients of the weights, which nothing waits for until the end of the batch."""

    @property
    def letter(self) -> str:
        """In drawings of schedules."""
        return "FBIW"[self]

    @property
    def label(self) -> str:
        """What its spans are called (`axonn.spans.SpanKind`)."""
        return ("forward", "backward", "backward-input", "backward-weight")[self]

    @property
    def sends(self) -> Direction | None:
        """Which way the task's result travels, and its input comes; None when both stay."""
        return (Direction.FORWARD, Direction.BACKWARD, Direction.BACKWARD, None)[self]


WHOLE = (Kind.FORWARD, Kind.BACKWARD)
"""The tasks of one (chunk, microbatch) pair."""
SPLIT = (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT)
"""The same, with backwards in two halves."""


class Task(NamedTuple):
    """A piece of work of a stage. Prints as `2F0`: chunk 2, forward, microbatch 0 (B backward, I and W its halves)."""

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

    What one chunk of a stage hands to another chunk of the same stage needs no message: the driver calls `arrived`
    right after `finished`. The chunk with the inputs is told of no activations and the one with the loss of no
    gradients; the schedule knows when their tasks are ready. Forwards, backwards and weight halves of one chunk each
    run in microbatch order, so that gradients accumulate in that order too.
    """

    def __init__(
        self, *, stage: int, stages: int, microbatches: int, layout: ChunkLayout, kinds: tuple[Kind, ...] = WHOLE
    ) -> None:
        if not 0 <= stage < stages:
            raise ValueError(f"stage {stage} is not one of {stages} stages")
        if layout.stages != stages:
            raise ValueError(f"a layout over {layout.stages} stages does not fit {stages} stages")
        if microbatches < 1:
            raise ValueError(f"a batch has at least 1 microbatch, not {microbatches}")
        self.stage = stage
        self.stages = stages
        self.microbatches = microbatches
        self.layout = layout
        self.chunks = layout.chunks
        self.kinds = kinds
        """What runs for each (chunk, microbatch) pair, in this order."""
        self.held = 0
        """(chunk, microbatch) pairs whose forward was handed out and whose last task has not finished."""
        self.finished_pairs = 0
        """Such pairs whose last task has finished."""
        self._last_kind = kinds[-1]

    @abstractmethod
    def arrived(self, direction: Direction, chunk: int, microbatch: int) -> None:
        """The activation or gradient that `chunk` of this stage needs for `microbatch` is here."""

    @abstractmethod
    def next_task(self) -> Task | None:
        """The next task, now handed out, or None when the stage has to wait for an event."""

    @property
    @abstractmethod
    def follows_arrivals(self) -> bool:
        """Whether another order of arrivals could make this stage run its tasks in another order.

        Where it is False the ranks of a stage run the same tasks in the same order, each by its own messages.
        """

    def finished(self, task: Task) -> None:
        """`task` has finished on the device."""
        if task[0] == self._last_kind:
            self.held -= 1
            self.finished_pairs += 1

    def waiting_for(self) -> str:
        """What must happen before this stage has a next task, in words for an error message."""
        if self.done:
            return "nothing"
        needs = []
        for direction in sorted({kind.sends for kind in self.kinds if kind.sends is not None}):
            what = ("an activation", "a gradient")[direction]
            origins = [self.layout.origin(self.stage, chunk, direction) for chunk in range(self.chunks)]
            stages = sorted({origin[0] for origin in origins if origin is not None} - {self.stage})
            needs += [f"{what} from stage {stage}" for stage in stages]
        return " or ".join(needs) or "the end of a task"

    @property
    def pairs(self) -> int:
        """(chunk, microbatch) pairs of a batch."""
        return self.microbatches * self.chunks

    @property
    def tasks(self) -> int:
        """Tasks of a batch."""
        return self.pairs * len(self.kinds)

    @property
    def done(self) -> bool:
        """True once every task of the batch has finished here."""
        return self.finished_pairs == self.pairs

    @property
    def splits_backward(self) -> bool:
        """Whether backwards run as two tasks, INPUT and WEIGHT, or as one, BACKWARD."""
        return Kind.INPUT in self.kinds

    @property
    @abstractmethod
    def limit(self) -> int:
        """Most (chunk, microbatch) pairs that this stage ever holds at once."""
