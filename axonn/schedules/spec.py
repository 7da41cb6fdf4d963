"""A schedule by name, with its options: what a configuration says, and what the registry makes schedules from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field

from axonn.config.loading import FileValue
from axonn.schedules.layout import ChunkLayout, ChunkPlacement


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec(FileValue):
    """A schedule by name, with its options.

    `in_flight_limit` and `pick` are those of the message-driven schedules. The limit defaults to twice the number of
    stages: at the published limit, one per stage, a stage waits whenever a message takes time (`docs/design.md`). With
    split backwards it limits the activations that a stage holds, in whole microbatches (`MessageDriven`). `pick` says
    which of several ready tasks runs; with the name of a static schedule it is the one that comes first in its order.
    `chunks` of layers lie on each stage, placed in loops or in a V (`ChunkLayout`).
    """

    name: str = "message-driven"
    in_flight_limit: Annotated[int, Field(ge=1)] | None = None
    pick: str = "backward-first"
    chunks: Annotated[int, Field(ge=1)] = 1
    placement: ChunkPlacement = "loop"

    def __str__(self) -> str:
        return " ".join(f"{key}={value!r}" for key, value in asdict(self).items())

    def layout(self, stages: int) -> ChunkLayout:
        """Return where this schedule's chunks lie on so many stages."""
        return ChunkLayout(stages=stages, chunks=self.chunks, placement=self.placement)

    def limit_on(self, stages: int) -> int:
        """Return the in-flight limit on so many stages."""
        return self.in_flight_limit or 2 * stages
