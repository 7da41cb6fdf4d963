"""The way of tensors from where they are computed into memory that MPI reads and writes, and back.

A message that leaves a GPU waits for an event of the stream that computes it, one that arrives makes the stream of its
consumer wait: neither waits for the device. What touches a GPU here has not been run on one; the order of its streams
is tested without (`tests/cuda_standin.py`), and so are the host's ways, staging included.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from axonn.distributed.tensor_spec import TensorSpec

Tensors = tuple[torch.Tensor, ...]


class Landed(NamedTuple):
    """Tensors on their device; `done` is when their contents are there (None: they are)."""

    tensors: Tensors
    done: torch.cuda.Event | None = None


class Path(ABC):
    """The way between tensors on `device` and the memory that MPI sees. Used by several threads, one at a time."""

    device: torch.device

    @abstractmethod
    def outgoing(self, tensors: Tensors) -> tuple[Tensors, Callable[[], bool]]:
        """Memory to send `tensors` from, and whether it may be read yet."""

    @abstractmethod
    def buffers(self, specs: Sequence[TensorSpec]) -> Tensors:
        """Memory to receive into, which nothing that is queued on the device still uses."""

    @abstractmethod
    def incoming(self, memory: Tensors) -> Landed:
        """Start to bring what was received to the device."""

    def hand_over(self, landed: Landed) -> Tensors:
        """The tensors, for the current stream of the calling thread."""
        return landed.tensors


class HostPath(Path):
    """Tensors in host memory, which MPI reads and writes where they are."""

    device = torch.device("cpu")

    def outgoing(self, tensors: Tensors) -> tuple[Tensors, Callable[[], bool]]:
        return tensors, lambda: True

    def buffers(self, specs: Sequence[TensorSpec]) -> Tensors:
        return tuple(torch.empty(spec.shape, dtype=spec.dtype) for spec in specs)

    def incoming(self, memory: Tensors) -> Landed:
        return Landed(memory)


class DevicePath(Path):
    """Tensors on a GPU whose memory MPI reads and writes itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def outgoing(self, tensors: Tensors) -> tuple[Tensors, Callable[[], bool]]:
        return tensors, torch.cuda.current_stream(self.device).record_event().query

    def buffers(self, specs: Sequence[TensorSpec]) -> Tensors:
        # On a stream that computes nothing: the allocator hands out only what every user is known to be done with.
        with torch.cuda.stream(self._stream):
            return tuple(torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for spec in specs)

    def incoming(self, memory: Tensors) -> Landed:
        return Landed(memory)

    def hand_over(self, landed: Landed) -> Tensors:
        for tensor in landed.tensors:
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return landed.tensors


class StagedPath(Path):
    """Tensors that pass through host memory, pinned when they come from a GPU, copied on a stream of their own.

    With a CPU as `device` they are copied all the same, so that it can be tested anywhere.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._gpu = device.type != "cpu"
        self._stream = torch.cuda.Stream(device) if self._gpu else None  # type: ignore[no-untyped-call]

    def outgoing(self, tensors: Tensors) -> tuple[Tensors, Callable[[], bool]]:
        specs = [TensorSpec(tuple(t.shape), t.dtype) for t in tensors]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._aside():
            memory = self.buffers(specs)
            for here, there in zip(memory, tensors, strict=True):
                here.copy_(there, non_blocking=True)
        return memory, (lambda: True) if self._stream is None else self._stream.record_event().query

    def buffers(self, specs: Sequence[TensorSpec]) -> Tensors:
        return tuple(torch.empty(spec.shape, dtype=spec.dtype, device="cpu", pin_memory=self._gpu) for spec in specs)

    def incoming(self, memory: Tensors) -> Landed:
        with self._aside():
            tensors = tuple(torch.empty_like(here, device=self.device, pin_memory=False) for here in memory)
            for there, here in zip(tensors, memory, strict=True):
                there.copy_(here, non_blocking=True)
        return Landed(tensors, None if self._stream is None else self._stream.record_event())

    def hand_over(self, landed: Landed) -> Tensors:
        if landed.done is not None:
            consumer = torch.cuda.current_stream(self.device)
            consumer.wait_event(landed.done)
            for tensor in landed.tensors:
                tensor.record_stream(consumer)
        return landed.tensors

    def _aside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def path_for(device: torch.device) -> Path:
    """The shortest way that this MPI allows for tensors on `device`."""
    from axonn.distributed.transport.gpu_aware import gpu_aware_mpi

    if device.type == "cpu":
        return HostPath()
    return DevicePath(device) if gpu_aware_mpi() is True else StagedPath(device)
