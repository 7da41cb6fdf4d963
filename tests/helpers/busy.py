"""Usage of processors as ranks note it, made up: of a machine that is idle but for them, and of a busy one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from axonn.observability.machine_usage import BatchUsage
from axonn.observability.procfs import available_cores


def usage(seconds: float = 1.0, *, others: float = 0.002, **changes: Any) -> BatchUsage:
    """A batch on two cores, both of which compute for two ranks; `others`: share of the cores that is not theirs."""
    took = 2 * seconds * others
    plain = {
        "seconds": seconds,
        "processor_s": 2 * seconds - took,
        "delay_s": 0.0,
        "load": 2.0,
        "cores": 2,
        "others_s": took,
        "stolen_s": 0.0,
    }
    return BatchUsage(**(plain | changes))


BUSY, QUIET = usage(others=0.5), usage()


@contextmanager
def busy_machine() -> Iterator[None]:
    """Twice as many processes as there are cores compute inside of the block, at the usual priority."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * available_cores())]
    try:
        yield
    finally:
        for process in spinners:
            process.kill()
            process.wait()
