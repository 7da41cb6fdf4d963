"""Lanes: functions that take turns on one rank, so that one computes while another's collective is under way.

Overdecomposition (Singh & Bhatele, arXiv 2305.13525) cuts the rows of a microbatch into sub-shards and runs each in a
lane. A lane gives its turn away where it would wait for a collective. Turns go round in a fixed order, whatever has
finished by then, so every rank of a group issues its collectives in the same order.

Lanes are threads of which one runs at a time: a lane may so be suspended in the midst of a forward, of autograd's
backward, or of a recomputation inside of it, which is written as if it were alone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class _Stopped(BaseException):
    """Another lane has failed; this one ends quietly."""


class Lanes:
    """Runs functions in turns, on `device` (default: the CPU). One object per rank, used by one thread at a time;
    `close` ends its threads."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        self._workers: list[_Worker] = []
        weakref.finalize(self, _close, self._workers)
        self._turns: list[threading.Lock] = []
        """Held, but for a moment when the lane's turn begins."""
        self._live: list[bool] = []
        self._mine = threading.local()
        self._failure: BaseException | None = None

    @property
    def lane(self) -> int | None:
        """Number of the lane that asks; None outside of `run`."""
        return getattr(self._mine, "lane", None)

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Results of the functions, in order; the first runs in the calling thread. Raises what the first failing
        function raised, after the others have ended.

        Whether gradients are recorded, inference mode and autocast are as in the calling thread.
        """
        if len(functions) == 1 or self.lane is not None:
            with _own_thread():
                return [function() for function in functions]
        lanes = len(functions)
        self._turns = [_held() for _ in range(lanes)]
        self._live = [True] * lanes
        self._failure = None
        results: list[Any] = [None] * lanes
        modes = _Modes(self._device)
        # All lanes give their work to the caller's stream: its order is that of the turns.
        stream = None if self._device.type == "cpu" else torch.cuda.current_stream(self._device)

        def body(lane: int) -> None:
            if lane:
                self._turns[lane].acquire()
            self._mine.lane = lane
            try:
                if self._failure is None:
                    same_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
                    with modes.again() if lane else nullcontext(), _own_thread(), same_stream:
                        results[lane] = functions[lane]()
            except _Stopped:
                pass
            except BaseException as error:
                self._failure = self._failure or error
            finally:
                self._mine.lane = None
                self._live[lane] = False
                following = self._next(lane)
                if following is not None:
                    self._turns[following].release()

        while len(self._workers) < lanes - 1:
            self._workers.append(_Worker(len(self._workers) + 1))
        for lane in range(1, lanes):
            self._workers[lane - 1].start(lambda lane=lane: body(lane))  # type: ignore[misc]
        body(0)
        for worker in self._workers[: lanes - 1]:
            worker.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return results

    def switch(self) -> None:
        """Let the other lanes go on, each up to its next switch or its end; nothing outside of `run`."""
        lane = self.lane
        if lane is None:
            return
        following = self._next(lane)
        if following is not None:
            self._turns[following].release()
            self._turns[lane].acquire()
        if self._failure is not None:
            raise _Stopped

    def close(self) -> None:
        """End the threads; a later `run` starts new ones. Also done when nobody refers to the lanes any more."""
        _close(self._workers)

    def _next(self, lane: int) -> int | None:
        lanes = len(self._live)
        return next((n for i in range(1, lanes) if self._live[n := (lane + i) % lanes]), None)


class _Modes:
    """What a thread has set for the operations that it runs, to be set in another one."""

    def __init__(self, device: torch.device) -> None:
        self._gradients = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in dict.fromkeys(["cpu", device.type])
            if torch.amp.is_autocast_available(kind)
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._gradients))
            for kind, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled=enabled))
            yield


def _close(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.close()
    workers.clear()


def _own_thread() -> AbstractContextManager[object]:
    """Inside of the block a backward runs in the thread that calls it, which knows its lane and its position, and not
    in autograd's thread of a GPU, which a waiting lane would stop."""
    return torch.autograd.set_multithreading_enabled(False)


def _held() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


class _Worker:
    """A thread that runs one function after another."""

    def __init__(self, number: int) -> None:
        self._work: Callable[[], None] | None = None
        self._begin = _held()
        self._end = _held()
        threading.Thread(target=self._loop, name=f"lane-{number}", daemon=True).start()

    def start(self, work: Callable[[], None]) -> None:
        self._work = work
        self._begin.release()

    def join(self) -> None:
        self._end.acquire()

    def close(self) -> None:
        self._work = None
        self._begin.release()

    def _loop(self) -> None:
        while True:
            self._begin.acquire()
            work, self._work = self._work, None
            if work is None:
                return
            work()
            # What it refers to, such as the lanes themselves, must not live as long as this thread.
            del work
            self._end.release()
