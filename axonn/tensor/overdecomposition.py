"""Overdecomposition in lanes: functions that take turns on one rank, one computing during another's collective.

Overdecomposition (Singh & Bhatele, arXiv 2305.13525) cuts the rows of a microbatch into sub-shards and runs each in a
lane. A lane gives up its turn where it would wait for a collective. Turns go round in a fixed order, whatever has
finished by then, so every rank of a group issues its collectives in the same order.

Lanes are threads of which one runs at a time, so a lane can be suspended in the middle of a forward, of autograd's
backward or of a recomputation in it, whose code needs no knowledge of lanes.
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
    """Raised in a lane when another one has failed, to end it quietly."""


class Lanes:
    """Lanes of one rank, which run functions in turns on `device` (default: the CPU).

    There is one object per rank, used by one thread at a time; `close` ends its threads.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        self._workers: list[_Worker] = []
        weakref.finalize(self, _close, self._workers)
        self._turns: list[threading.Lock] = []
        """Lock of each lane, held except for the moment when its turn begins."""
        self._live: list[bool] = []
        self._local = threading.local()
        self._failure: BaseException | None = None

    @property
    def lane(self) -> int | None:
        """Number of the calling lane; None outside of `run`."""
        return getattr(self._local, "lane", None)

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Run the functions in turns and return their results in order; the first runs in the calling thread.

        Gradient mode, inference mode and autocast are those of the calling thread. Raises what the first failing
        function raised, after the others have ended.
        """
        if len(functions) == 1 or self.lane is not None:
            with _backward_in_calling_thread():
                return [function() for function in functions]
        lanes = len(functions)
        self._turns = [_held() for _ in range(lanes)]
        self._live = [True] * lanes
        self._failure = None
        results: list[Any] = [None] * lanes
        modes = _Modes(self._device)
        # All lanes launch their work on the caller's stream, in the order of the turns.
        stream = None if self._device.type == "cpu" else torch.cuda.current_stream(self._device)

        def body(lane: int) -> None:
            if lane:
                self._turns[lane].acquire()
            self._local.lane = lane
            try:
                if self._failure is None:
                    same_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
                    with modes.restored() if lane else nullcontext(), _backward_in_calling_thread(), same_stream:
                        results[lane] = functions[lane]()
            except _Stopped:
                pass
            except BaseException as error:
                self._failure = self._failure or error
            finally:
                self._local.lane = None
                self._live[lane] = False
                following = self._following(lane)
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
        """Let the other lanes go on, each to its next switch or its end. Without effect outside of `run`."""
        lane = self.lane
        if lane is None:
            return
        following = self._following(lane)
        if following is not None:
            self._turns[following].release()
            self._turns[lane].acquire()
        if self._failure is not None:
            raise _Stopped

    def close(self) -> None:
        """End the threads; a later `run` starts new ones. Also happens when the object is garbage-collected."""
        _close(self._workers)

    def _following(self, lane: int) -> int | None:
        lanes = len(self._live)
        return next((n for i in range(1, lanes) if self._live[n := (lane + i) % lanes]), None)


class _Modes:
    """The calling thread's gradient mode, inference mode and autocast, to be restored in another thread."""

    def __init__(self, device: torch.device) -> None:
        self._gradients = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in dict.fromkeys(["cpu", device.type])
            if torch.amp.is_autocast_available(kind)
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
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


def _backward_in_calling_thread() -> AbstractContextManager[object]:
    """Make a backward inside the block run in the calling thread, which has the lane and the position in training.

    In autograd's own thread for a GPU, a waiting lane would block all backwards.
    """
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
            # Objects it refers to, such as the lanes themselves, must not live as long as this thread.
            del work
            self._end.release()
