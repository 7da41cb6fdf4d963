"""What a device was given to do, in which order, and when it did it.

Under CUDA work runs later than its call, on streams that events order and time. On a CPU each call has done its work
when it returns: the same code runs there with streams that are none and moments that are readings of the clock. Nothing
here waits for a whole device.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch

from axonn.spans import SpanKind, SpanRecorder


class Completion(Protocol):
    """Work of other threads or devices that ends by itself, as collectives do."""

    @property
    def finished_at(self) -> float | None:
        """When it was complete, in seconds of `time.perf_counter`; None before that and where nobody can tell."""
        ...

    def wait(self) -> None:
        """Return when the result is there."""
        ...


class DeviceEvent:
    """The point in the current stream's work at which it was made, or the instant `at` on a CPU's clock."""

    def __init__(self, device: torch.device, *, timed: bool, at: float | None = None) -> None:
        self._device = device
        self.event: torch.cuda.Event | None = None
        self.at = 0.0
        if device.type != "cpu":
            self.event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
            self.event.record(torch.cuda.current_stream(device))
        elif timed:
            self.at = SpanRecorder.now() if at is None else at

    @property
    def passed(self) -> bool:
        """Whether the device has come to it."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Let what the current stream is given from now on run after this moment. The host does not wait."""
        if self.event is not None:
            torch.cuda.current_stream(self._device).wait_event(self.event)

    def synchronize(self) -> None:
        """Let the host wait for this moment, and for nothing that the device does after it."""
        if self.event is not None:
            self.event.synchronize()


class SideStream:
    """A second stream; `with` it, it is the current one."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type != "cpu":
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


class DeviceToHostCopy:
    """A few numbers on their way from the device to the host, which does not wait before `wait`.

    `values` [n], which must stay as they are until then.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._host = values
        self._copied: torch.cuda.Event | None = None
        if not values.is_cpu:
            self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream(values.device).record_event()

    def wait(self) -> list[float]:
        """The numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers


class _Pending(NamedTuple):
    kind: SpanKind
    start: DeviceEvent
    end: DeviceEvent
    where: dict[str, int]


class Timeline:
    """Moments and streams of `device`, and the spans between moments."""

    def __init__(self, device: torch.device, spans: SpanRecorder | None) -> None:
        self.device = device
        self.spans = spans
        self._wire = SideStream(device)
        self._pending: list[_Pending] = []

    @property
    def timed(self) -> bool:
        """Whether spans are taken."""
        return self.spans is not None

    def now(self) -> DeviceEvent:
        """This moment, in the order of what the device was given."""
        return DeviceEvent(self.device, timed=self.timed)

    def at(self, seconds: float | None) -> DeviceEvent:
        """The instant at which a clock showed `seconds`; `now` where nobody has looked."""
        return DeviceEvent(self.device, timed=self.timed, at=seconds)

    @staticmethod
    def later(one: DeviceEvent, other: DeviceEvent) -> DeviceEvent:
        """The later of two moments; under CUDA, where only the device knows, the second."""
        return one if one.event is None and one.at > other.at else other

    def side_stream(self) -> SideStream:
        """Another queue of work of the same device."""
        return SideStream(self.device)

    def result_of(self, work: Completion) -> DeviceEvent:
        """Let the current stream go on when the result of a collective is there; when that is.

        The end of a collective is a moment of a stream that does nothing else: that of the current stream would come no
        sooner than what it still computes.
        """
        with self._wire:
            work.wait()
            finished = self.at(work.finished_at)
        finished.wait()
        return finished

    def span(self, kind: SpanKind, start: DeviceEvent, end: DeviceEvent, **where: int) -> None:
        """Note a span, `where` as of `SpanRecorder.add`. Under CUDA it is recorded by the next `flush`."""
        if self.spans is None or not self.spans.recording:
            return
        if end.event is None:
            self.spans.add(kind, start.at, end.at, **where)
        else:
            self._pending.append(_Pending(kind, start, end, where))

    def flush(self) -> None:
        """Record what was noted. Under CUDA the host waits for the end of it, so it is called where that is anyway."""
        if self.spans is None or not self._pending:
            return
        for pending in self._pending:
            pending.end.synchronize()
        last = self.now()
        last.synchronize()
        last.at = SpanRecorder.now()
        for kind, start, end, where in self._pending:
            self.spans.add(kind, _seconds(start, last), _seconds(end, last), **where)
        self._pending.clear()


def _seconds(moment: DeviceEvent, last: DeviceEvent) -> float:
    first: Any = moment.event
    return last.at - 1e-3 * float(first.elapsed_time(last.event))
