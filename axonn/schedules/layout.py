"""Where the chunks of layers lie: one per stage, in loops, or in a V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from axonn.schedules.base import Direction

ChunkPlacement = Literal["loop", "v"]


@dataclass(frozen=True, kw_only=True)
class ChunkLayout:
    """`chunks` pieces of the network on each of `stages` stages; piece number i of the whole is *virtual stage* i.

    loop: after the last stage the next chunk begins on the first stage again (interleaved 1F1B: Narayanan et al., SC
    2021). v: the next chunk goes back the way the last one came, so that the turn needs no message (Qi et al., arXiv
    2401.10241, section 6).
    """

    stages: int
    chunks: int = 1
    placement: ChunkPlacement = "loop"

    @property
    def virtual_stages(self) -> int:
        """Chunks of all stages."""
        return self.stages * self.chunks

    def virtual(self, stage: int, chunk: int) -> int:
        """The virtual stage that is `chunk` of `stage`."""
        back = self.placement == "v" and chunk % 2 == 1
        return chunk * self.stages + (self.stages - 1 - stage if back else stage)

    def place(self, virtual: int) -> tuple[int, int]:
        """(stage, chunk) of a virtual stage: the inverse of `virtual`."""
        chunk, position = divmod(virtual, self.stages)
        back = self.placement == "v" and chunk % 2 == 1
        return (self.stages - 1 - position if back else position), chunk

    def is_source(self, stage: int, chunk: int) -> bool:
        """Whether this chunk reads the batch's inputs."""
        return self.virtual(stage, chunk) == 0

    def is_sink(self, stage: int, chunk: int) -> bool:
        """Whether this chunk computes the loss."""
        return self.virtual(stage, chunk) == self.virtual_stages - 1

    def target(self, stage: int, chunk: int, direction: Direction) -> tuple[int, int] | None:
        """(stage, chunk) to which this chunk hands its activation or gradient; None past the ends of the network.

        It may be another chunk of the same stage: then there is no message, and the driver tells the schedule at once.
        """
        virtual = self.virtual(stage, chunk) + (1 if direction == Direction.FORWARD else -1)
        return self.place(virtual) if 0 <= virtual < self.virtual_stages else None

    def origin(self, stage: int, chunk: int, direction: Direction) -> tuple[int, int] | None:
        """(stage, chunk) from which this chunk gets its activation or gradient; None past the ends of the network."""
        return self.target(stage, chunk, Direction.BACKWARD if direction == Direction.FORWARD else Direction.FORWARD)
