"""Readings of /proc, against what is done to a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from axonn.observability import procfs

pytestmark = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's /proc/*/schedstat")


def test_what_a_process_computed_is_read_and_sleeping_is_not_computing() -> None:
    before = procfs.read_process(os.getpid())
    assert before is not None
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    time.sleep(0.3)
    after = procfs.read_process(os.getpid())
    assert after is not None
    assert after.processor_s - before.processor_s == pytest.approx(0.3, abs=0.1)
    assert after.delay_s is not None
    assert before.delay_s is not None
    assert after.delay_s >= before.delay_s


def test_waiting_for_a_core_shows_in_the_delay() -> None:
    """Two processes on one core: each waits while the other computes."""
    core = str(min(os.sched_getaffinity(0)))
    spin = "import os,sys,time\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", spin, core]) for _ in range(2)]
    try:
        deadline = time.monotonic() + 60
        delays = [0.0, 0.0]
        while min(delays) < 0.2 and time.monotonic() < deadline:
            time.sleep(0.1)
            found = [procfs.read_process(p.pid) for p in processes]
            delays = [reading.delay_s or 0.0 for reading in found if reading is not None]
        assert len(delays) == 2
        assert min(delays) >= 0.2
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_stopped_process_is_told_from_one_that_sleeps_and_from_none() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        stopped = procfs.read_process(process.pid)
        assert stopped is not None
        assert stopped.state == "T"
    finally:
        process.kill()
        process.wait()
    assert procfs.read_process(process.pid) is None


def test_the_machine_has_a_load_and_what_is_damaged_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = procfs.read_machine()
    assert reading is not None
    assert reading.load >= 0
    assert reading.stolen_s >= 0
    (tmp_path / "loadavg").write_text("x")
    monkeypatch.setattr(procfs, "PROC", tmp_path)
    assert procfs.read_machine() is None
    assert procfs.read_process(os.getpid()) is None
