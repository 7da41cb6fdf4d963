"""Readings of Linux's /proc: how long processes computed and waited for a core, and how busy the machine is.

The standard library alone, since ranks of any framework use it, also where this suite is not installed. A reading that
the system does not have (another system than Linux, a process that has ended) is None.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class ProcessReading(NamedTuple):
    """One process at one instant, all of its threads together."""

    state: str
    """Letter of its main thread's state: R runs or is runnable, S and D sleep, T is stopped, Z has ended."""
    processor_s: float
    """Seconds that its threads computed since it began, in user and system mode, to the tick (10 ms)."""
    delay_s: float | None
    """Seconds that its living threads were runnable and waited for a core (run-queue delay)."""


class MachineReading(NamedTuple):
    """The machine at one instant."""

    load: float
    """Processes that run or want to, mean over the last minute."""
    stolen_s: float
    """Seconds, summed over the cores, that the host of this virtual machine gave to others since it started."""


class CoreReading(NamedTuple):
    """One core at one instant, since the machine started."""

    busy_s: float
    """Seconds that it computed for processes, in user and system mode; interrupts are nobody's and left out."""
    stolen_s: float
    """Seconds that the host of this virtual machine gave to others while the core had something to do."""


TICK_S = 1 / _TICKS_PER_S
"""Step of the counters of `CoreReading`."""


def read_process(pid: int) -> ProcessReading | None:
    """Return what /proc says of the process `pid`, or None."""
    try:
        # The name, in parentheses, may hold blanks and parentheses.
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return ProcessReading(fields[0], (int(fields[11]) + int(fields[12])) / _TICKS_PER_S, _delay_s(pid))
    except (OSError, ValueError, IndexError):
        return None


def _delay_s(pid: int) -> float | None:
    total = 0
    for task in (PROC / str(pid) / "task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[1])
        except (ProcessLookupError, FileNotFoundError):
            if not (task.parent.parent / "schedstat").exists():
                return None
    return total / 1e9


def read_machine() -> MachineReading | None:
    """Return the machine's load and stolen time, or None."""
    try:
        load = float((PROC / "loadavg").read_text().split()[0])
        cpu = (PROC / "stat").read_text().split("\n", 1)[0].split()
        return MachineReading(load, int(cpu[8]) / _TICKS_PER_S)
    except (OSError, ValueError, IndexError):
        return None


def read_cores() -> dict[int, CoreReading]:
    """Return a reading of every core that is on, by its number; nothing where there is none to be had."""
    try:
        lines = [line.split() for line in (PROC / "stat").read_text().splitlines()]
        return {
            int(fields[0].removeprefix("cpu")): CoreReading(
                sum(map(int, fields[1:4])) / _TICKS_PER_S, int(fields[8]) / _TICKS_PER_S
            )
            for fields in lines
            if fields and fields[0].startswith("cpu") and fields[0] != "cpu"
        }
    except (OSError, ValueError, IndexError):
        return {}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
