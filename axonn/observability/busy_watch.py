"""Whether the machine was busy with other work while this process and its children measured something."""

from __future__ import annotations

import os
import resource
import time

from axonn.observability.machine_usage import BatchUsage, busy_share, is_busy
from axonn.observability.procfs import read_cores, read_machine


class BusyWatch:
    """Reads the processors when it is made, and again when it is asked. Children count once they have been waited for.

    For what has no records with the usage of each batch: calibrations and benchmarks.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._own = _own_s()
        self._cores = read_cores()

    def usage(self) -> BatchUsage | None:
        """Return what the processors did meanwhile; None on a system without /proc."""
        machine, now = read_machine(), read_cores()
        cores = [number for number in self._cores.keys() & now.keys() if number in os.sched_getaffinity(0)]
        if machine is None or not cores:
            return None
        own = _own_s() - self._own
        busy = sum(now[number].busy_s - self._cores[number].busy_s for number in cores)
        stolen = sum(now[number].stolen_s - self._cores[number].stolen_s for number in cores)
        return BatchUsage(
            seconds=time.monotonic() - self._began,
            processor_s=own,
            load=machine.load,
            cores=len(cores),
            others_s=busy - own,
            stolen_s=max(0.0, stolen),
        )

    def share(self) -> float | None:
        """Return the share of the core seconds that went to others; None where nobody knows."""
        usage = self.usage()
        return None if usage is None else busy_share([usage])

    def warning(self) -> str | None:
        """Return a line that says that the machine was busy and what to do, or None where it was not."""
        usage = self.usage()
        if usage is None or not is_busy([usage]):
            return None
        return (
            f"the machine was busy with other work meanwhile: others took {busy_share([usage]):.0%} of the cores (load "
            f"{usage.load:.1f}); do not take these times as they are, and measure again when it is idle"
        )


def _own_s() -> float:
    """Processor seconds of this process and of its children."""
    found = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in found)
