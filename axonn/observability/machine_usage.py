"""How busy a machine was with other work while something was measured on it, by what its processors did.

A core that computes for another process, or that the host of a virtual machine gave away, is none that the ranks could
have used. So the machine is *busy* by the share of the core seconds of a measurement that went to others: processor
time of all processes on the cores that the ranks may run on, less that of the ranks, and stolen time. How long ranks
wait for cores (run-queue delay) does not enter: ranks that outnumber the cores wait for each other. Nothing of it
depends on the framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Annotated

from pydantic import Field

from axonn.config.train_config import StrictModel

BUSY_SHARE = 0.05
"""Share of the core seconds from which a machine is busy.

Ranks that use all cores take at least 1 / (1 - share) times as long, and where all wait for the one that was held up,
up to 1 + cores x share: with 5% of 2 cores 5 to 10%, as much as runs on an idle machine differ (docs/results.md).
The launcher and the supervisor of the ranks, which count as others, take 0.2% of 2 cores with batches of a second.
"""
TICK_S = 0.01
"""Step of the counters of a core: one measurement is off by up to a tick on each, several by its root."""


_Seconds = Annotated[float, Field(ge=0, le=1e9)]


class BatchUsage(StrictModel):
    """What the processors did during one batch; of several hosts, that with the largest share for others."""

    seconds: _Seconds
    """Between the readings that this is made of."""
    processor_s: _Seconds
    """Processor time of all ranks, of all hosts together."""
    delay_s: _Seconds | None = None
    """Run-queue delay of the rank that waited most for a core; None where the system does not tell."""
    load: _Seconds
    """Processes that ran or wanted to, mean over the minute before the end of the batch."""
    cores: int = Field(ge=1, le=1_000_000)
    """On which the ranks of the host may run."""
    others_s: float = Field(ge=-1e9, le=1e9)
    """Processor seconds on these cores of processes that are none of the ranks. Counters of different steps are
    subtracted, so that it may be below 0 by some ticks."""
    stolen_s: _Seconds
    """Seconds of these cores that the host of the virtual machine gave to others."""

    @property
    def core_s(self) -> float:
        """Seconds that the cores had together."""
        return self.cores * self.seconds


def busy_share(batches: Sequence[BatchUsage]) -> float | None:
    """Return the share of the core seconds of these batches that went to others; None of no batches."""
    whole = sum(batch.core_s for batch in batches)
    return max(0.0, sum(batch.others_s + batch.stolen_s for batch in batches) / whole) if whole else None


def is_busy(batches: Sequence[BatchUsage]) -> bool | None:
    """Return whether others took more than `BUSY_SHARE`, beyond what the counters resolve; None of no batches."""
    if not batches:
        return None
    taken = sum(batch.others_s + batch.stolen_s for batch in batches)
    resolved = TICK_S * sqrt(sum(batch.cores**2 for batch in batches))
    return taken > BUSY_SHARE * sum(batch.core_s for batch in batches) + resolved
