"""A GPU without a GPU: tensors without values on device "meta", streams and events that order nothing but their notes.

The engine takes whatever is no CPU for a GPU.

Inside of `standing_in` every operation is noted with the stream it is given to, and checked as CUDA would punish it:

- operands on different devices, or a number that the host takes off the device (`.item()`), raise (tensors without
  values do that by themselves);
- a copy for which the host would wait raises `HostWaits`;
- two streams, or a stream and the host, that touch the same bytes without an event between them, one of them writing,
  raise `Race`. Happened-before is kept as vector clocks, as PyTorch's CUDA sanitizer does, but by ranges of bytes.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from axonn.distributed.collectives import CollectiveGroup, CollectiveHandle, Collectives, Operation
from axonn.tensor.overdecomposition import Lanes

_device_constructors()  # It remembers the functions that make tensors, which are not yet others here.
DEVICE = torch.device("meta")
Clock = dict[int, int]


class Race(AssertionError):
    """Two streams touch the same memory without order."""


class HostWaits(AssertionError):
    """The host waits for the device where it should not."""


def _merge(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


class Event:
    """`torch.cuda.Event`."""

    def __init__(self, gpu: Gpu, **options: Any) -> None:
        self._gpu = gpu
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or self._gpu.current).clock)

    def query(self) -> bool:
        self._gpu.learns(self.clock)
        return True

    def synchronize(self) -> None:
        self._gpu.waits += 1
        self._gpu.learns(self.clock)

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Stream:
    """`torch.cuda.Stream`."""

    _numbers = itertools.count(1)

    def __init__(self, gpu: Gpu, device: Any = None, **options: Any) -> None:
        self._gpu = gpu
        self.number = next(self._numbers)
        self.clock: Clock = {}

    def wait_event(self, event: Event) -> None:
        _merge(self.clock, event.clock)

    def wait_stream(self, stream: Stream) -> None:
        _merge(self.clock, stream.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._gpu)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._gpu.waits += 1
        self._gpu.learns(self.clock)


class _Access(NamedTuple):
    first: int
    stop: int
    stream: int
    tick: int
    writes: bool
    what: str


@dataclass
class Gpu:
    """What is known of a device."""

    default: Stream = field(init=False)
    host: Clock = field(default_factory=dict)
    waits: int = 0
    """How often the host waited for an event or a stream."""
    operations: int = 0

    def __post_init__(self) -> None:
        self.default = Stream(self)
        self._entered = threading.local()
        self._touched: dict[int, list[_Access]] = {}
        # As long as they are noted, no other storage may get their number.
        self._kept: list[Any] = []
        self._ticks = itertools.count(1)
        self.checks = True

    @property
    def current(self) -> Stream:
        stack: list[Stream] = getattr(self._entered, "stack", [])
        return stack[-1] if stack else self.default

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """`torch.cuda.stream`."""
        stack: list[Stream] = self._entered.__dict__.setdefault("stack", [])
        stack.append(stream)
        try:
            yield
        finally:
            stack.pop()

    @contextmanager
    def unchecked(self) -> Iterator[None]:
        """Inside of the block the host may wait, and what is done there comes before everything after it."""
        self.checks = False
        try:
            yield
        finally:
            self.checks = True

    def learns(self, clock: Clock) -> None:
        """The host knows that this has happened."""
        _merge(self.host, clock)

    def touch(self, what: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], *, on_host: bool) -> None:
        """An operation of the current stream, or of the host itself (number 0)."""
        if not self.checks:
            return
        self.operations += 1
        number, clock = (0, self.host) if on_host else (self.current.number, self.current.clock)
        _merge(clock, self.host)  # It was given to the stream only now.
        tick = next(self._ticks)
        for tensors, writing in ((reads, False), (writes, True)):
            for tensor in tensors:
                self._check(what, tensor, number, clock, tick, writing=writing)
        clock[number] = tick

    def _check(self, what: str, tensor: torch.Tensor, number: int, clock: Clock, tick: int, *, writing: bool) -> None:
        if not tensor.numel():
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        first = tensor.storage_offset() * tensor.element_size()
        extent = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        stop = first + extent * tensor.element_size()
        if key not in self._touched:
            self._kept.append(storage)
        known = self._touched.setdefault(key, [])
        for one in known:
            apart = one.stop <= first or stop <= one.first
            if apart or not (writing or one.writes) or one.stream == number or clock.get(one.stream, 0) >= one.tick:
                continue
            raise Race(
                f"{what} on stream {number} {'writes' if writing else 'reads'} what {one.what} on stream {one.stream} "
                f"{'writes' if one.writes else 'reads'}, and nothing orders them"
            )
        # What this access comes after in any case need not be remembered beside it.
        inside = [a for a in known if first <= a.first and a.stop <= stop and (writing or not a.writes)]
        kept = [a for a in known if a not in inside or not (writing or a.stream == number)]
        self._touched[key] = [*kept, _Access(first, stop, number, tick, writing, what)]


class _Noted(TorchDispatchMode):
    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if self._gpu.checks:
            self._refuse_to_wait(name, tensors, args, kwargs)
        if name == "aten.copy_.default" and args[0].is_cpu and not args[1].is_cpu:
            result = args[0]  # There are no values to copy.
        elif name.startswith("aten._fused_sgd_."):
            result = None  # It changes its arguments, which have no values, and has no form without them.
        else:
            result = func(*args, **kwargs)
        results = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        on_gpu = any(not t.is_cpu for t in (*tensors, *results))
        changed = [
            t
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in tree_leaves(value)
            if isinstance(t, torch.Tensor)
        ]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and "empty" not in name:
            storages = {t.untyped_storage()._cdata for t in tensors}
            made = [t for t in results if t.untyped_storage()._cdata not in storages]
            self._gpu.touch(name, tensors, [*changed, *made], on_host=not on_gpu)
        return result

    @staticmethod
    def _refuse_to_wait(name: str, tensors: Sequence[torch.Tensor], args: Any, kwargs: Any) -> None:
        if not name.startswith(("aten.copy_", "aten._to_copy")):
            if len({t.device for t in tensors if t.dim()}) > 1:
                raise RuntimeError(f"{name} has operands on two different devices")
            return
        devices = {t.device for t in tensors} | {kwargs.get("device") or tensors[0].device}
        asynchronous = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2] is True)
        if len(devices) > 1 and not asynchronous:
            raise HostWaits(f"{name} between host and device, for which the host waits")


def _pageable(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return make(*args, **options)

    return made


@contextmanager
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Inside of the block `DEVICE` can be computed with; `Gpu` says what happened. Lanes' threads too."""
    gpu = Gpu()
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "Event": lambda **options: Event(gpu, **options),
        "Stream": lambda device=None, **options: Stream(gpu, device, **options),
        "current_stream": lambda device=None: gpu.current,
        "stream": gpu.stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def refuse(*_: Any) -> None:
        raise HostWaits("torch.cuda.synchronize waits for the whole device")

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    # Without CUDA no memory can be pinned.
    monkeypatch.setattr(torch, "empty", _pageable(torch.empty))
    monkeypatch.setattr(torch, "zeros", _pageable(torch.zeros))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self.clone())

    def tolist(self: torch.Tensor) -> list[float]:
        gpu.touch("tolist", [self], [], on_host=self.is_cpu)
        return [0.0] * self.numel()  # There is none.

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    run = Lanes.run

    def run_noted(self: Lanes, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        def inside(function: Callable[[], Any]) -> Any:
            if threading.current_thread() is caller:
                return function()
            with _Noted(gpu):
                return function()

        caller = threading.current_thread()
        return run(self, [lambda function=function: inside(function) for function in functions])  # type: ignore[misc]

    monkeypatch.setattr(Lanes, "run", run_noted)
    with _Noted(gpu):
        yield gpu


class _Nccl(CollectiveHandle):
    def __init__(self, gpu: Gpu, done: Event) -> None:
        self._gpu, self._done = gpu, done

    def wait(self) -> None:
        self._gpu.current.wait_event(self._done)


class StandInCollectives(Collectives):
    """Collectives as NCCL runs them: on a stream of their own, behind what is current; the peers are nowhere."""

    def __init__(self, grid: Any, rank: int, gpu: Gpu) -> None:
        super().__init__(grid, rank)
        self._gpu = gpu
        self._wire = Stream(gpu)

    def _group(self, ranks: tuple[int, ...], axes: Any) -> Any:
        return None

    def _all_reduce(self, tensor: torch.Tensor, group: CollectiveGroup, operation: Operation) -> CollectiveHandle:
        return self._run(lambda: tensor.mul_(2))

    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: CollectiveGroup) -> CollectiveHandle:
        return self._run(lambda: output.copy_(tensor.expand_as(output)))

    @torch.no_grad()
    def _run(self, act: Callable[[], object]) -> CollectiveHandle:
        self._wire.wait_stream(self._gpu.current)
        with self._gpu.stream(self._wire):
            act()
        return _Nccl(self._gpu, self._wire.record_event())
