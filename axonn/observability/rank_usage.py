"""Log of the processor usage of one rank and its machine, one row per batch.

Every rank writes `usage-K.jsonl` into the run folder, one JSON object per line and batch: `step`; `host`; `seconds`
between its two readings; `processor_s` and `delay_s`, the seconds that its threads computed and waited for a core;
`load` of the machine; and `cores`: for each core that the rank may run on, by number, the seconds that it was busy for
any process, and that the host of the virtual machine gave to other guests. `axonn.observability.batch_usage` combines
the logs. Uses only the standard library: ranks of other frameworks load this module by its path.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import IO, NamedTuple

# Relative, so that the module can be loaded without the package `axonn`.
from .procfs import CoreReading, read_cores, read_machine, read_process

USAGE = "usage-*.jsonl"
"""Pattern of the names of all ranks' files."""


def usage_file(folder: Path, rank: int) -> Path:
    """Return the path of the log of one rank."""
    return folder / f"usage-{rank}.jsonl"


class _Reading(NamedTuple):
    at: float
    processor_s: float
    delay_s: float | None
    cores: dict[int, CoreReading]


def _read() -> _Reading | None:
    process, cores = read_process(os.getpid()), read_cores()
    if process is None or not cores:
        return None
    allowed = os.sched_getaffinity(0)
    usable = {number: reading for number, reading in cores.items() if number in allowed}
    # The process clock counts nanoseconds, /proc counts ticks.
    return _Reading(time.perf_counter(), time.process_time(), process.delay_s, usable)


class UsageLog:
    """Writer of the usage log of this rank; it writes nothing on a system without /proc."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._file: IO[str] = open(usage_file(folder, rank), "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._before = _read()

    def begin(self) -> None:
        """Start a batch now instead of at the end of the previous one."""
        self._before = _read()

    def note(self, step: int) -> None:
        """Write the row of batch `step`, which ends now. Raises `OSError` when the disk is full."""
        before, self._before = self._before, _read()
        after, machine = self._before, read_machine()
        if before is None or after is None or machine is None:
            return
        delay = None if before.delay_s is None or after.delay_s is None else after.delay_s - before.delay_s
        cores = {
            number: [round(now - then, 6) for then, now in zip(before.cores[number], after.cores[number], strict=True)]
            for number in before.cores.keys() & after.cores.keys()
        }
        row = {
            "step": step,
            "host": platform.node(),
            "seconds": round(after.at - before.at, 6),
            "processor_s": round(after.processor_s - before.processor_s, 6),
            # Threads that ended meanwhile are missing from the sum, which may thus shrink.
            "delay_s": None if delay is None else max(0.0, round(delay, 6)),
            "load": machine.load,
            "cores": cores,
        }
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
