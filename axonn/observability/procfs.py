"""Readings of Linux's /proc: processor time and run-queue delay of processes, and load of the machine.

Uses only the standard library, because ranks of any framework load it, also where this suite is not installed. A
reading that is not available (another system than Linux, a process that has ended) is None.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class ProcessReading(NamedTuple):
    """State and counters of one process, summed over its threads."""

    state: str
    """State of its main thread: R running or runnable, S or D asleep, T stopped, Z ended."""
    processor_s: float
    """Processor seconds of its threads since it started, user and system mode, to the tick (10 ms)."""
    delay_s: float | None
    """Seconds that its live threads were runnable but waited for a core (run-queue delay)."""


class MachineReading(NamedTuple):
    """Load and stolen time of the machine."""

    load: float
    """Load average: runnable processes, mean over the last minute."""
    stolen_s: float
    """Seconds since it started, summed over cores, that the host of this virtual machine gave to other guests."""


class CoreReading(NamedTuple):
    """Counters of one core since the machine started."""

    busy_s: float
    """Seconds that it ran processes, in user and system mode; interrupts belong to no process and are left out."""
    stolen_s: float
    """Seconds that the host of this virtual machine gave to other guests while the core had work to do."""


TICK_S = 1 / _TICKS_PER_S
"""Resolution of the counters of `CoreReading`, in seconds."""


def read_process(pid: int) -> ProcessReading | None:
    """Return a reading of the process `pid`, or None."""
    try:
        # The process name, in parentheses, may contain spaces and parentheses.
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
    """Return a reading of every core that is online, by its number; empty if there is none."""
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
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
