"""Transfer of tensors over `torch.distributed` groups of two ranks: Gloo in host memory, NCCL on a GPU's streams."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from axonn.distributed.tensor_spec import TensorSpec


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


class Transfer(ABC):
    """A transfer under way."""

    @abstractmethod
    def wait(self) -> None:
        """Block this thread, with the GIL released, until the memory may be reused (send) or is filled (receive)."""

    @abstractmethod
    def abort(self) -> None:
        """Make the `wait` of another thread raise. The wire cannot be used afterwards."""


class Wire(ABC):
    """One end of a group of two ranks that carries tensors in order, one way."""

    @abstractmethod
    def buffers(self, specs: Sequence[TensorSpec]) -> tuple[torch.Tensor, ...]:
        """Return memory to receive into that no work queued on the device still uses."""

    @abstractmethod
    def send(self, tensors: Sequence[torch.Tensor]) -> Transfer:
        """Start to send; the tensors must not change until the transfer is done."""

    @abstractmethod
    def receive(self, buffers: Sequence[torch.Tensor]) -> Transfer:
        """Start to receive the next tensors that the peer sends."""

    def hand_over(self, tensors: Sequence[torch.Tensor]) -> None:
        """Prepare received tensors for use on the current stream of the calling thread."""
        return None


class _GlooTransfer(Transfer):
    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()

    def abort(self) -> None:
        for work in self._works:
            # A wait that times out closes the connection, and that ends every other wait on it.
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(milliseconds=1))


class GlooWire(Wire):
    """Wire for tensors in host memory. `end` is 0 at one end and 1 at the other; both must be made."""

    def __init__(self, store: Store, end: int, *, timeout: timedelta) -> None:
        self._group: Any = dist.ProcessGroupGloo(store, end, 2, timeout)
        self._peer = 1 - end

    def buffers(self, specs: Sequence[TensorSpec]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(spec.shape, dtype=spec.dtype) for spec in specs)

    def send(self, tensors: Sequence[torch.Tensor]) -> Transfer:
        return _GlooTransfer([self._group.send([_as_bytes(t)], self._peer, 0) for t in tensors])

    def receive(self, buffers: Sequence[torch.Tensor]) -> Transfer:
        return _GlooTransfer([self._group.recv([_as_bytes(b)], self._peer, 0) for b in buffers])


class _NcclTransfer(Transfer):
    def __init__(self, done: torch.cuda.Event, group: Any) -> None:
        self._done = done
        self._group = group

    def wait(self) -> None:
        self._done.synchronize()

    def abort(self) -> None:
        self._group.abort()


class NcclWire(Wire):
    """Wire for tensors on a GPU. Neither measured nor run yet: no machine of ours has had two GPUs.

    A stream of its own orders the transfer after the work that computed the tensors, and after nothing else. Buffers
    are allocated on that stream, and the consumer's use of them is recorded with the allocator, so that none is filled
    while a queued kernel still reads it.
    """

    def __init__(self, store: Store, end: int, *, timeout: timedelta, device: torch.device) -> None:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        self._group: Any = dist.ProcessGroupNCCL(store, end, 2, options)
        self._peer = 1 - end
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffers(self, specs: Sequence[TensorSpec]) -> tuple[torch.Tensor, ...]:
        with torch.cuda.stream(self._stream):
            return tuple(torch.empty(spec.shape, dtype=spec.dtype, device=self._device) for spec in specs)

    def send(self, tensors: Sequence[torch.Tensor]) -> Transfer:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            non_empty = [t for t in tensors if t.numel()]
            return self._under_way([self._group.send([_as_bytes(t)], self._peer, 0) for t in non_empty])

    def receive(self, buffers: Sequence[torch.Tensor]) -> Transfer:
        with torch.cuda.stream(self._stream):
            non_empty = [b for b in buffers if b.numel()]
            return self._under_way([self._group.recv([_as_bytes(b)], self._peer, 0) for b in non_empty])

    def _under_way(self, works: Sequence[Any]) -> Transfer:
        for work in works:
            work.wait()  # Makes the stream wait; the host goes on.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(self._stream)
        return _NcclTransfer(done, self._group)

    def hand_over(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream(self._device))
