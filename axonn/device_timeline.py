"""What a device was given to do, in which order, and when it did it.

Under CUDA work runs later than its call, on streams that events order and time. On a CPU each call has done its work
when it returns: the same code runs there with streams that are none and moments that are readings of the clock.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple

import torch

from axonn.trace import SpanKind, SpanRecorder


class Moment:
    """The point in the current stream's work at which it was made, or the instant `at` on a CPU's clock."""

    def __init__(self, device: torch.device, *, timed: bool, at: float | None = None) -> None:
        self._device = device
        self.event: torch.cuda.Event | None = None
        self.at = 0.0
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
            self.event.record(torch.cuda.current_stream(device))
        elif timed:
            self.at = SpanRecorder.now() if at is None else at

    def wait(self) -> None:
        """Let what the current stream is given from now on run after this moment. The host does not wait."""
        if self.event is not None:
            torch.cuda.current_stream(self._device).wait_event(self.event)


class SideStream:
    """A second stream; `with` it, it is the current one."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._entered = ExitStack()

    def __enter__(self) -> None:
        if self._stream is not None:
            self._entered.enter_context(torch.cuda.stream(self._stream))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    def synchronize(self) -> None:
        """Let the host wait until everything on this stream is done."""
        if self._stream is not None:
            self._stream.synchronize()


class _Pending(NamedTuple):
    kind: SpanKind
    start: Moment
    end: Moment


class Timeline:
    """Moments and streams of `device`, and the spans between moments."""

    def __init__(self, device: torch.device, spans: SpanRecorder | None) -> None:
        self._device = device
        self._spans = spans
        self._pending: list[_Pending] = []

    def now(self) -> Moment:
        return Moment(self._device, timed=self._spans is not None)

    def at(self, seconds: float | None) -> Moment:
        """The instant at which a clock showed `seconds`; `now` where nobody has looked."""
        return Moment(self._device, timed=self._spans is not None, at=seconds)

    @staticmethod
    def later(one: Moment, other: Moment) -> Moment:
        """The later of two moments; under CUDA, where only the device knows, the second."""
        return one if one.event is None and one.at > other.at else other

    def side_stream(self) -> SideStream:
        return SideStream(self._device)

    def span(self, kind: SpanKind, start: Moment, end: Moment) -> None:
        """Note a span; it is recorded by the next `flush`."""
        if self._spans is not None:
            self._pending.append(_Pending(kind, start, end))

    def flush(self) -> None:
        """Record what was noted. Under CUDA the host waits for the end of it, so only a traced run does."""
        if self._spans is None or not self._pending:
            return
        for pending in self._pending:
            if pending.end.event is not None:
                pending.end.event.synchronize()
        last = self.now()
        if last.event is not None:
            last.event.synchronize()
            last.at = SpanRecorder.now()
        for kind, start, end in self._pending:
            self._spans.add(kind, _seconds(start, last), _seconds(end, last))
        self._pending.clear()


def _seconds(moment: Moment, last: Moment) -> float:
    if moment.event is None or last.event is None:
        return moment.at
    return last.at - 1e-3 * float(moment.event.elapsed_time(last.event))
