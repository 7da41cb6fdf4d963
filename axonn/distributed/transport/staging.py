"""Staging of tensors between the device that computes them and memory that MPI can read and write.

An outgoing message waits for an event of the stream that computes it, an incoming one makes its consumer's stream wait:
neither synchronises the device. The GPU paths have not been run on a GPU; the order of their streams is tested without
one (`tests/helpers/cuda_standin.py`), and so are the host paths, staging included.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from axonn.distributed.tensor_spec import TensorSpec

Tensors = tuple[torch.Tensor, ...]


class ReceivedTensors(NamedTuple):
    """Received tensors on their device; `done`: event after which their contents are valid (None: they already are)."""

    tensors: Tensors
    done: torch.cuda.Event | None = None


class MemoryPath(ABC):
    """Path between tensors on `device` and the memory that MPI accesses. Used by several threads, one at a time."""

    device: torch.device

    @abstractmethod
    def outgoing(self, tensors: Tensors) -> tuple[Tensors, Callable[[], bool]]:
        """Return the memory to send `tensors` from, and a function that returns True once it may be read."""

    @abstractmethod
    def buffers(self, specs: Sequence[TensorSpec]) -> Tensors:
        """Return memory to receive into that no work queued on the device still uses."""

    @abstractmethod
    def incoming(self, memory: Tensors) -> ReceivedTensors:
        """Start to copy received memory to the device."""

    def hand_over(self, landed: ReceivedTensors) -> Tensors:
        """Return the tensors for use on the current stream of the calling thread."""
        return landed.tensors


class HostPath(MemoryPath):
    """Path of tensors in host memory, which MPI reads and writes in place."""

    device = torch.device("cpu")

    def outgoing(self, tensors: Tensors) -> tuple[Tensors, Callable[[], bool]]:
        return tensors, lambda: True

    def buffers(self, specs: Sequence[TensorSpec]) -> Tensors:
        return tuple(torch.empty(spec.shape, dtype=spec.dtype) for spec in specs)

    def incoming(self, memory: Tensors) -> ReceivedTensors:
        return ReceivedTensors(memory)


class DevicePath(MemoryPath):
    """Path of tensors on a GPU whose memory MPI reads and writes itself (GPU-aware MPI)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def outgoing(self, tensors: Tensors) -> tuple[Tensors, Callable[[], bool]]:
        return tensors, torch.cuda.current_stream(self.device).record_event().query

    def buffers(self, specs: Sequence[TensorSpec]) -> Tensors:
        # On a stream without compute: the allocator then returns only memory that all its users are done with.
        with torch.cuda.stream(self._stream):
            return tuple(torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for spec in specs)

    def incoming(self, memory: Tensors) -> ReceivedTensors:
        return ReceivedTensors(memory)

    def hand_over(self, landed: ReceivedTensors) -> Tensors:
        for tensor in landed.tensors:
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return landed.tensors


class StagedPath(MemoryPath):
    """Path of tensors through host memory, pinned if they are on a GPU, copied on a stream of their own.

    With a CPU as `device` they are copied as well, so that it can be tested anywhere.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._gpu = device.type != "cpu"
        self._stream = torch.cuda.Stream(device) if self._gpu else None  # type: ignore[no-untyped-call]

    def outgoing(self, tensors: Tensors) -> tuple[Tensors, Callable[[], bool]]:
        specs = [TensorSpec(tuple(t.shape), t.dtype) for t in tensors]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._on_copy_stream():
            memory = self.buffers(specs)
            for buffer, tensor in zip(memory, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=True)
        return memory, (lambda: True) if self._stream is None else self._stream.record_event().query

    def buffers(self, specs: Sequence[TensorSpec]) -> Tensors:
        return tuple(torch.empty(spec.shape, dtype=spec.dtype, device="cpu", pin_memory=self._gpu) for spec in specs)

    def incoming(self, memory: Tensors) -> ReceivedTensors:
        with self._on_copy_stream():
            tensors = tuple(torch.empty_like(buffer, device=self.device, pin_memory=False) for buffer in memory)
            for tensor, buffer in zip(tensors, memory, strict=True):
                tensor.copy_(buffer, non_blocking=True)
        return ReceivedTensors(tensors, None if self._stream is None else self._stream.record_event())

    def hand_over(self, landed: ReceivedTensors) -> Tensors:
        if landed.done is not None:
            consumer = torch.cuda.current_stream(self.device)
            consumer.wait_event(landed.done)
            for tensor in landed.tensors:
                tensor.record_stream(consumer)
        return landed.tensors

    def _on_copy_stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def path_for(device: torch.device) -> MemoryPath:
    """Return the shortest path that this MPI allows for tensors on `device`."""
    from axonn.distributed.transport.gpu_aware import gpu_aware_mpi

    if device.type == "cpu":
        return HostPath()
    return DevicePath(device) if gpu_aware_mpi() is True else StagedPath(device)
