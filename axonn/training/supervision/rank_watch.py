"""Watch over the ranks of one run, from outside of them, until they end or have to be ended."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from axonn.observability.records import Failure
from axonn.training.metrics import BATCHES, Tail
from axonn.training.run_folder import STOP, Heartbeats, stack_of
from axonn.training.run_outcome import rank_state
from axonn.training.supervision.interruption import WARNINGS, PendingSignals, number_of
from axonn.training.supervision.liveness import Vitality, counted_standstill, load_message

SILENCE_S = 20.0
"""Silence of a rank after which it is checked whether it is dead."""
SAVE_S = 20.0
"""Time for ranks to end their batch and save; schedulers and shells that end a command give it about 30 s."""
_POLL_S = 0.1


class Watch:
    """Watch over the ranks of a started run, with the options of `supervise`.

    At the first `pending` interruption, with `on_stop`, the ranks are asked to save their state and end. How long that
    may take depends on the signal: after Control-C or a warning of a limit as long as they need, otherwise `SAVE_S`.
    A second interruption ends them at once, and so does SIGQUIT.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        folder: Path,
        ranks: int,
        *,
        timeout_s: float,
        stall_limit_s: float,
        on_batch: Callable[[int], None],
        give_up: Callable[[], Failure | None],
        pending: PendingSignals,
        on_stop: Callable[[str], None] | None,
        on_warning: Callable[[str], None],
    ) -> None:
        self._process = process
        self._folder = folder
        self._ranks = range(ranks)
        self._timeout_s = timeout_s
        self._stall_limit_s = stall_limit_s
        self._on_batch = on_batch
        self._give_up = give_up
        self._pending = pending
        self._on_stop = on_stop
        self._asked_to_stop = False
        self._beats = Heartbeats(folder, ranks)
        self._vitality = Vitality(partial(rank_state, folder), on_warning)

    def until_end(self) -> Failure | None:
        """Wait for the end of the run; return a failure if the run has to be ended."""
        started = time.monotonic()
        batches = Tail(self._folder / BATCHES)
        done = len(batches.new())
        while self._process.poll() is None:
            time.sleep(_POLL_S)
            if new := len(batches.new()):
                done += new
                self._report(done)
            if (failure := self._interrupted() or self._give_up()) is not None:
                return failure
            self._beats.look()
            if (failure := self._dead_rank() or self._standstill()) is not None:
                return failure
            if min(map(self._beats.silence, self._ranks)) > SILENCE_S and self._all_ended():
                return None  # Only the launcher is left, and does not end.
            if time.monotonic() - started > self._timeout_s:
                return Failure(
                    cause="timeout", detail=f"not finished after {self._timeout_s:.0f} s, {done} batches done"
                )
        return None

    def _report(self, done: int) -> None:
        try:
            self._on_batch(done)
        except KeyboardInterrupt as interruption:
            self._pending.note(number_of(interruption))

    def _interrupted(self) -> Failure | None:
        pending = self._pending
        if pending.first is None:
            return None
        if self._on_stop is None or pending.first == signal.SIGQUIT:
            return Failure(cause="interrupted", detail=pending.message)
        if not self._asked_to_stop:
            self._asked_to_stop = True
            try:
                (self._folder / STOP).touch()
            except OSError as error:
                detail = f"{pending.message}; the ranks cannot be told to save: {error}"
                return Failure(cause="interrupted", detail=detail)
            self._report_stop(self._on_stop)
            return None
        if pending.another:
            return Failure(cause="interrupted", detail=f"{pending.message}, and again before the ranks had saved")
        if pending.first not in (signal.SIGINT, *WARNINGS) and time.monotonic() - pending.since > SAVE_S:
            detail = f"{pending.message}; the ranks had not saved after {SAVE_S:.0f} s and were ended"
            return Failure(cause="interrupted", detail=detail)
        return None

    def _report_stop(self, on_stop: Callable[[str], None]) -> None:
        # If printing fails because nobody reads the output, the ranks save all the same.
        with contextlib.suppress(KeyboardInterrupt):
            on_stop(self._pending.message)

    def _dead_rank(self) -> Failure | None:
        for rank in self._ranks:
            silence = self._beats.silence(rank)
            if silence <= SILENCE_S:
                self._vitality.heard(rank)
                continue
            running = rank_state(self._folder, rank).get("state") == "started"
            if running and (why := self._vitality.why_dead(rank, silence)) is not None:
                return Failure(cause="dead-rank", rank=rank, detail=why)
        return None

    def _standstill(self) -> Failure | None:
        standstill = self._beats.standstill()
        starved = self._vitality.starved_s(self._ranks, standstill)
        if counted_standstill(standstill, starved) <= self._stall_limit_s:
            return None
        rank = self._beats.first_to_stop()
        detail = self._beats.standstill_message()
        if starved > 0.1 * standstill:
            detail = f"{detail}; ranks were starved of a core for {starved:.0f} s of it ({load_message()})"
        process = rank_state(self._folder, rank).get("pid")
        if isinstance(process, int) and (stack := stack_of(self._folder, rank, process)) is not None:
            detail = f"{detail}; it stands at {stack}"
        return Failure(cause="timeout", rank=rank, detail=detail)

    def _all_ended(self) -> bool:
        return all(rank_state(self._folder, rank).get("state") in ("done", "stopped") for rank in self._ranks)
