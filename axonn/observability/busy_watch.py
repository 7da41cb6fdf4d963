"""Detection of other work on the machine while this process and its children measure something."""

from __future__ import annotations

import os
import resource
import time

from axonn.observability.machine_usage import BatchUsage, busy_share, is_busy
from axonn.observability.procfs import read_cores, read_machine


class BusyWatch:
    """Processor usage since this object was made. Child processes count once they have been waited for.

    For measurements without records of each batch: calibrations and benchmarks.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._processor_s = _processor_s()
        self._cores = read_cores()

    def usage(self) -> BatchUsage | None:
        """Return the processor usage so far; None on a system without /proc."""
        machine, now = read_machine(), read_cores()
        cores = [number for number in self._cores.keys() & now.keys() if number in os.sched_getaffinity(0)]
        if machine is None or not cores:
            return None
        processor_s = _processor_s() - self._processor_s
        busy = sum(now[number].busy_s - self._cores[number].busy_s for number in cores)
        stolen = sum(now[number].stolen_s - self._cores[number].stolen_s for number in cores)
        return BatchUsage(
            seconds=time.monotonic() - self._began,
            processor_s=processor_s,
            load=machine.load,
            cores=len(cores),
            others_s=busy - processor_s,
            stolen_s=max(0.0, stolen),
        )

    def share(self) -> float | None:
        """Return the share of the core seconds that other processes took; None if unknown."""
        usage = self.usage()
        return None if usage is None else busy_share([usage])

    def warning(self) -> str | None:
        """Return a line that says that the machine was busy and what to do; None if it was idle or this is unknown."""
        usage = self.usage()
        if usage is None or not is_busy([usage]):
            return None
        return (
            f"the machine was busy with other work meanwhile: others took {busy_share([usage]):.0%} of the cores (load "
            f"{usage.load:.1f}); do not take these times as they are, and measure again when it is idle"
        )


def _processor_s() -> float:
    """Return the processor seconds of this process and its children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
