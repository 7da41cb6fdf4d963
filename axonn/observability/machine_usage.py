"""Load that other work puts on the machine during a measurement, from the counters of its processors.

The ranks cannot use a core while it computes for another process, or while the host of a virtual machine gives it to
another guest. So a machine is *busy* by the share of the core seconds of a measurement that went to others: processor
time of all processes on the cores that the ranks may run on, less that of the ranks, plus stolen time. The time that
ranks wait for cores (run-queue delay) does not count: ranks that outnumber the cores wait for each other. All of this
is independent of the framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Annotated

from pydantic import Field

from axonn.config.train_config import StrictModel

BUSY_SHARE = 0.05
"""Share of the core seconds above which a machine counts as busy.

Ranks that use all cores take at least 1 / (1 - share) times as long, and up to 1 + cores x share if all wait for the
one that was delayed: 5 to 10% longer at a share of 5% of 2 cores, as much as runs on an idle machine differ
(docs/results.md). The launcher and the supervisor of the ranks count as others; they take 0.2% of 2 cores at one batch
per second.
"""
TICK_S = 0.01
"""Resolution of the counters of a core: a batch is off by up to one tick per core; errors add up in quadrature."""


_Seconds = Annotated[float, Field(ge=0, le=1e9)]


class BatchUsage(StrictModel):
    """Processor usage during one batch; with several hosts, that of the host with the largest share for others."""

    seconds: _Seconds
    """Wall time between the two readings."""
    processor_s: _Seconds
    """Processor time of all ranks, summed over all hosts."""
    delay_s: _Seconds | None = None
    """Run-queue delay of the rank that waited most for a core; None if the system does not report it."""
    load: _Seconds
    """Load average: runnable processes, mean over the minute before the end of the batch."""
    cores: int = Field(ge=1, le=1_000_000)
    """Number of cores that the ranks of the host may run on."""
    others_s: float = Field(ge=-1e9, le=1e9)
    """Processor seconds that other processes than the ranks took on these cores. It is a difference of counters with
    different resolutions, so it may be negative by a few ticks."""
    stolen_s: _Seconds
    """Seconds of these cores that the host of the virtual machine gave to other guests."""

    @property
    def core_s(self) -> float:
        """Seconds of all cores together."""
        return self.cores * self.seconds


def busy_share(batches: Sequence[BatchUsage]) -> float | None:
    """Return the share of the core seconds of these batches that went to others; None if there are no batches."""
    core_s = sum(batch.core_s for batch in batches)
    return max(0.0, sum(batch.others_s + batch.stolen_s for batch in batches) / core_s) if core_s else None


def is_busy(batches: Sequence[BatchUsage]) -> bool | None:
    """Return whether others took more than `BUSY_SHARE`, beyond the counters' resolution; None without batches."""
    if not batches:
        return None
    taken = sum(batch.others_s + batch.stolen_s for batch in batches)
    resolved = TICK_S * sqrt(sum(batch.cores**2 for batch in batches))
    return taken > BUSY_SHARE * sum(batch.core_s for batch in batches) + resolved
