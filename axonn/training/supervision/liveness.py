"""Liveness of this machine's ranks by /proc, which tells dead ranks from starved or blocked ones.

A missing heartbeat proves nothing: its thread may wait for a core, for the interpreter's lock or for a slow disk. A
rank is dead when its process has ended or is stopped. Otherwise the supervisor waits for it, as long as the limit of a
standstill allows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from axonn.observability.procfs import PROC, ProcessReading, read_machine, read_process

_WORTH = 0.01
"""Share of the time from which a process counts as computing, or as waiting for a core."""
_LOOK_EVERY_S = 1.0
_MOST_STARVED = 4.0
"""Multiple of the standstill limit that a run with starved ranks may take."""


@dataclass
class _Seen:
    """Last reading of a rank's process, and the seconds it has computed and starved since the first reading."""

    at: float
    reading: ProcessReading
    runnable: bool
    computed: float = 0.0
    starved: float = 0.0
    elapsed: float = 0.0


class Vitality:
    """Activity of the processes of ranks. `state_of`: returns the last state that a rank wrote, with its process id;
    `on_warning` is called for starved and blocked ranks, once each."""

    def __init__(
        self, state_of: Callable[[int], Mapping[str, Any]], on_warning: Callable[[str], None] = lambda text: None
    ) -> None:
        self._state_of = state_of
        self._on_warning = on_warning
        self._warned: set[tuple[int, str]] = set()
        self._silent: dict[int, _Seen] = {}
        self._standing: dict[int, _Seen] = {}
        self._starved_s = self._standstill_s = 0.0

    def why_dead(self, rank: int, silence_s: float) -> str | None:
        """Return why a rank that has been silent for `silence_s` seconds is dead; None while it lives."""
        reading = self._reading(rank)
        where = f"rank {rank} gave no sign of life for {silence_s:.0f} s"
        if reading is None:
            # Without /proc, silence is the only sign.
            return f"{where}: its process has ended" if _has_proc() else where
        if reading.state in "ZX":
            return f"{where}: its process has ended"
        if reading.state in "Tt":
            return f"{where}: its process is stopped (state {reading.state}: SIGSTOP, or a debugger)"
        self._warn_of(rank, silence_s, reading)
        return None

    def heard(self, rank: int) -> None:
        """Note a heartbeat of a rank."""
        self._silent.pop(rank, None)

    def _warn_of(self, rank: int, silence_s: float, reading: ProcessReading) -> None:
        seen = _update(self._silent, rank, self._process(rank), reading)
        if seen.elapsed < _LOOK_EVERY_S:
            return
        if seen.starved >= _WORTH * seen.elapsed:
            activity, detail = "starved", f"it waits for a core {seen.starved / seen.elapsed:.0%} of the time"
        elif seen.computed >= _WORTH * seen.elapsed:
            activity, detail = "busy", f"it computes {seen.computed / seen.elapsed:.0%} of the time"
        else:
            activity = "blocked"
            detail = f"it neither computes nor waits for a core (state {reading.state}), as on a slow disk"
        if (rank, activity) not in self._warned:
            self._warned.add((rank, activity))
            self._on_warning(
                f"rank {rank} is {activity}: no sign of life for {silence_s:.0f} s, but {detail}; {load_message()}; "
                "it is waited for"
            )

    def starved_s(self, ranks: range, standstill_s: float) -> float:
        """Return for how many of the `standstill_s` seconds in which no rank has finished anything the most starved
        rank waited for a core, as far as that was watched: call it often."""
        if standstill_s < max(_LOOK_EVERY_S, self._standstill_s):
            # Something was finished.
            self._standing.clear()
            self._starved_s = 0.0
        elif standstill_s - self._standstill_s < _LOOK_EVERY_S and self._standing:
            return self._starved_s
        else:
            before = {rank: seen.starved for rank, seen in self._standing.items()}
            most = 0.0
            for rank in ranks:
                if (reading := self._reading(rank)) is not None:
                    seen = _update(self._standing, rank, self._process(rank), reading)
                    most = max(most, seen.starved - before.get(rank, 0.0))
            self._starved_s += most
        self._standstill_s = standstill_s
        return self._starved_s

    def _process(self, rank: int) -> int:
        process = self._state_of(rank).get("pid")
        return process if isinstance(process, int) else -1

    def _reading(self, rank: int) -> ProcessReading | None:
        return read_process(self._process(rank))


def counted_standstill(standstill_s: float, starved_s: float) -> float:
    """Return the seconds of a standstill that count against its limit: those in which ranks did not wait for a core,
    but at least a quarter of all."""
    return max(standstill_s - starved_s, standstill_s / _MOST_STARVED)


def load_message() -> str:
    """Return the load of the machine as text."""
    machine = read_machine()
    return "the load of the machine is not known" if machine is None else f"load {machine.load:.1f}"


def _update(known: dict[int, _Seen], rank: int, process: int, reading: ProcessReading) -> _Seen:
    now = time.monotonic()
    last = known.get(rank)
    if last is None:
        known[rank] = _Seen(now, reading, _is_runnable(process))
        return known[rank]
    elapsed = now - last.at
    if elapsed < _LOOK_EVERY_S:
        return last
    runnable = _is_runnable(process)
    # A process of many threads computes and waits for more than one second in each.
    computed = min(elapsed, max(0.0, reading.processor_s - last.reading.processor_s))
    starved = 0.0
    if reading.delay_s is not None and last.reading.delay_s is not None:
        starved = min(elapsed, max(0.0, reading.delay_s - last.reading.delay_s))
    if runnable and last.runnable and computed + starved == 0.0:
        # The system counts a delay only once it has ended.
        starved = elapsed
    last.elapsed += elapsed
    last.computed += computed
    last.starved += starved
    last.at, last.reading, last.runnable = now, reading, runnable
    return last


def _is_runnable(process: int) -> bool:
    """Return whether a thread of the process computes or waits for a core."""
    for task in (PROC / str(process) / "task").glob("*/stat"):
        try:
            if task.read_text(errors="replace").rpartition(")")[2].split()[0] == "R":
                return True
        except (OSError, IndexError):
            continue
    return False


def _has_proc() -> bool:
    return (PROC / "self" / "stat").exists()
