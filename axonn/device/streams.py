"""Streams and events of a device: the order of the work it was given, and when it ran.

Under CUDA, work runs after the call that launches it, on streams that events order and time. On a CPU the work is done
when the call returns: the same code runs there with empty streams and with events that are clock readings. Nothing here
synchronises a whole device.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch

from axonn.spans import SpanKind, SpanRecorder


class Completion(Protocol):
    """Work of other threads or devices that completes by itself, as collectives do."""

    @property
    def finished_at(self) -> float | None:
        """Time of completion in seconds of `time.perf_counter`; None before that, or if it is unknown."""
        ...

    def wait(self) -> None:
        """Wait until the result is available."""
        ...


class DeviceEvent:
    """A point in the work of the stream that is current when it is made; on a CPU, the instant `at` of its clock."""

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
        """True once the device has reached this event."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Make later work of the current stream run after this event. The host does not wait."""
        if self.event is not None:
            torch.cuda.current_stream(self._device).wait_event(self.event)

    def synchronize(self) -> None:
        """Make the host wait for this event, but for no later work of the device."""
        if self.event is not None:
            self.event.synchronize()


class SideStream:
    """A second stream; it is the current one inside a `with` block. Without effect on a CPU."""

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
        """Make the host wait until all work of this stream is done."""
        if self._stream is not None:
            self._stream.synchronize()


class DeviceToHostCopy:
    """Asynchronous copy of a few numbers from the device to the host, which waits only in `wait`.

    `values` [n] must not change until then.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._host = values
        self._copied: torch.cuda.Event | None = None
        if not values.is_cpu:
            self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream(values.device).record_event()

    def wait(self) -> list[float]:
        """Return the numbers once they have arrived."""
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
    """Events and streams of `device`, and the spans between events."""

    def __init__(self, device: torch.device, spans: SpanRecorder | None) -> None:
        self.device = device
        self.spans = spans
        self._wire = SideStream(device)
        self._pending: list[_Pending] = []

    @property
    def timed(self) -> bool:
        """True if spans are recorded."""
        return self.spans is not None

    def now(self) -> DeviceEvent:
        """Return an event after all work that the current stream was given so far."""
        return DeviceEvent(self.device, timed=self.timed)

    def at(self, seconds: float | None) -> DeviceEvent:
        """Return the event at clock reading `seconds`; the same as `now` if that is None, and under CUDA."""
        return DeviceEvent(self.device, timed=self.timed, at=seconds)

    @staticmethod
    def later(first: DeviceEvent, second: DeviceEvent) -> DeviceEvent:
        """Return the later of two events; under CUDA, where only the device knows, the second."""
        return first if first.event is None and first.at > second.at else second

    def side_stream(self) -> SideStream:
        """Return another stream of the same device."""
        return SideStream(self.device)

    def result_of(self, work: Completion) -> DeviceEvent:
        """Make the current stream wait for the result of a collective; return the event at which it was complete.

        The end of a collective is an event of a stream that does nothing else: an event of the current stream would
        come only after the work that is still queued on it.
        """
        with self._wire:
            work.wait()
            finished = self.at(work.finished_at)
        finished.wait()
        return finished

    def span(self, kind: SpanKind, start: DeviceEvent, end: DeviceEvent, **where: int) -> None:
        """Record a span with the fields `where` of `SpanRecorder.add`; under CUDA at the next `flush`."""
        if self.spans is None or not self.spans.recording:
            return
        if end.event is None:
            self.spans.add(kind, start.at, end.at, **where)
        else:
            self._pending.append(_Pending(kind, start, end, where))

    def flush(self) -> None:
        """Record the pending spans. Under CUDA the host waits for their ends, so call it where it waits anyway."""
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
