"""The end of a process that was started in a session of its own, with everything that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

GRACE_S = 3.0
"""Seconds that a process has to end by itself after SIGTERM."""


def end_process_group(process: subprocess.Popen[bytes], *, grace_s: float = GRACE_S) -> None:
    """End a process and its group: SIGTERM first, SIGKILL for what is left after `grace_s` seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    # A launcher that has ended by itself may have left others of its group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
