"""Asynchronous collectives over groups of the grid; every call is counted."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from axonn.errors import GridError
from axonn.grid import AXES, Axis, ProcessGrid

Operation = Literal["sum", "max"]
CallKind = Literal["all-reduce sum", "all-reduce max", "all-gather"]
_KINDS: dict[Operation, CallKind] = {"sum": "all-reduce sum", "max": "all-reduce max"}


class CollectiveHandle(ABC):
    """A collective under way."""

    @property
    def finished_at(self) -> float | None:
        """Time of completion in seconds of `time.perf_counter`; None before that, or if it is unknown."""
        return None

    @abstractmethod
    def wait(self) -> None:
        """Wait until the result is in the tensor."""


@dataclass(frozen=True)
class CollectiveGroup:
    """Ranks that take part in a collective, with the implementation's handle of the group.

    `axes`: axes of the grid along which the ranks differ; some of them may have one rank only.
    """

    ranks: tuple[int, ...]
    axes: tuple[Axis, ...]
    handle: Any = field(default=None, compare=False)


class Call(NamedTuple):
    """One collective as this rank issued it."""

    kind: CallKind
    axes: tuple[Axis, ...]
    """Axes of the grid along which `ranks` differ, in the order of `AXES`."""
    ranks: tuple[int, ...]
    elements: int
    """Elements of the tensor that this rank contributes."""
    dtype: str
    element_size: int
    """Bytes per element."""

    @property
    def bytes(self) -> int:
        """Bytes that this rank contributes to the collective."""
        return self.elements * self.element_size


class Collectives(ABC):
    """Collectives of one rank. Groups are created once, by all ranks in the same order.

    `calls`: how often this rank has issued each collective so far. Collectives in a group of one rank send nothing and
    are not counted.
    """

    device_type = "cpu"
    """Type of the devices whose tensors are exchanged."""

    def __init__(self, grid: ProcessGrid, rank: int) -> None:
        self.grid = grid
        self.rank = rank
        self.calls: Counter[Call] = Counter()

    def __deepcopy__(self, memo: object) -> Collectives:
        """Return the same object: groups belong to the job and are not copied."""
        return self

    def axis_group(self, axes: Sequence[Axis]) -> CollectiveGroup:
        """Return the group of ranks that differ from this one along `axes` only."""
        ranks = self.grid.group(self.rank, axes)
        return CollectiveGroup(ranks, tuple(axis for axis in AXES if axis in axes), self._group(ranks, axes))

    def stage_group(self, stages: tuple[int, ...]) -> CollectiveGroup | None:
        """Return the group of the ranks of this rank's pipeline on `stages`; None if this rank is on another stage.

        Every rank of the grid must call it with the same stages in the same order.
        """
        group = None
        for pipeline in self.grid.groups(["inter"]):
            ranks = tuple(pipeline[stage] for stage in stages)
            handle = self._group(ranks, None)
            if self.rank in ranks:
                group = CollectiveGroup(ranks, ("inter",), handle)
        return group

    def all_reduce(
        self, tensor: torch.Tensor, group: CollectiveGroup, operation: Operation = "sum"
    ) -> CollectiveHandle:
        """Start an all-reduce of `tensor` in place over `group`. It must not be touched before `wait`."""
        if len(group.ranks) == 1:
            return _NothingToDo()
        self._count(_KINDS[operation], tensor, group)
        return self._all_reduce(tensor, group, operation)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: CollectiveGroup) -> CollectiveHandle:
        """Start an all-gather of contiguous `tensor` [*shape] into contiguous `output` [ranks, *shape].

        The order is that of `group.ranks`. Neither tensor may be touched before `wait`.
        """
        if len(group.ranks) == 1:
            output[0] = tensor
            return _NothingToDo()
        self._count("all-gather", tensor, group)
        return self._all_gather(output, tensor, group)

    def _count(self, kind: CallKind, tensor: torch.Tensor, group: CollectiveGroup) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.calls[Call(kind, group.axes, group.ranks, tensor.numel(), dtype, tensor.element_size())] += 1

    @abstractmethod
    def _group(self, ranks: tuple[int, ...], axes: Sequence[Axis] | None) -> Any: ...

    @abstractmethod
    def _all_reduce(self, tensor: torch.Tensor, group: CollectiveGroup, operation: Operation) -> CollectiveHandle: ...

    @abstractmethod
    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: CollectiveGroup) -> CollectiveHandle: ...


class _TorchWork(CollectiveHandle):
    def __init__(self, work: Any, tensor: torch.Tensor) -> None:
        self._work = work
        self._finished_at: float | None = None
        if tensor.device.type == "cpu":
            # Runs in the backend's thread, also while this one computes. (NCCL would call it when the work is queued.)
            work.get_future().add_done_callback(self._stamp)

    def _stamp(self, _: Any) -> None:
        self._finished_at = time.perf_counter()

    @property
    def finished_at(self) -> float | None:
        return self._finished_at

    def wait(self) -> None:
        self._work.wait()


class TorchCollectives(Collectives):
    """Collectives over `torch.distributed` (NCCL or Gloo), which must be initialised with as many ranks as the grid."""

    def __init__(self, grid: ProcessGrid, rank: int, *, device_type: str = "cpu") -> None:
        super().__init__(grid, rank)
        self.device_type = device_type
        self._mesh = grid.connect(device_type)

    def _group(self, ranks: tuple[int, ...], axes: Sequence[Axis] | None) -> Any:
        if axes is not None and len(axes) == 1:
            return self._mesh.get_group(axes[0])
        if axes is not None and set(axes) == set(AXES):
            return dist.group.WORLD
        # If every rank is in one such group, its members alone create it; its name counts the groups each has made.
        return dist.new_group(list(ranks), use_local_synchronization=axes is not None)

    def _all_reduce(self, tensor: torch.Tensor, group: CollectiveGroup, operation: Operation) -> CollectiveHandle:
        op = dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX
        return _TorchWork(dist.all_reduce(tensor, op=op, group=group.handle, async_op=True), tensor)

    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: CollectiveGroup) -> CollectiveHandle:
        # Backends differ in the output shapes they accept; all accept flat ones.
        work = dist.all_gather_into_tensor(output.view(-1), tensor.view(-1), group=group.handle, async_op=True)
        return _TorchWork(work, tensor)


class _StagedWork(CollectiveHandle):
    """A Gloo collective on `staged`, in host memory, whose result is copied to `tensor`."""

    def __init__(self, work: Any, staged: torch.Tensor, tensor: torch.Tensor) -> None:
        self._work: Any = work
        self._staged = staged
        self._tensor = tensor

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
            self._tensor.copy_(self._staged, non_blocking=True)


class StagedCollectives(TorchCollectives):
    """Collectives of GPU tensors through host memory, over Gloo: for ranks that share a GPU, which NCCL refuses.

    The host waits until the tensor has been computed; the collective then overlaps with later compute. CPU tensors are
    staged as well, so that it can be tested anywhere.
    """

    def _all_reduce(self, tensor: torch.Tensor, group: CollectiveGroup, operation: Operation) -> CollectiveHandle:
        staged = _to_host(tensor)
        op = dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX
        return _StagedWork(dist.all_reduce(staged, op=op, group=group.handle, async_op=True), staged, tensor)

    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: CollectiveGroup) -> CollectiveHandle:
        staged = torch.empty(output.shape, dtype=output.dtype, device="cpu", pin_memory=not output.is_cpu)
        work = dist.all_gather_into_tensor(
            staged.view(-1), _to_host(tensor).view(-1), group=group.handle, async_op=True
        )
        return _StagedWork(work, staged, output)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a complete copy in host memory; under CUDA the host waits for the copy and earlier work of the stream."""
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=not tensor.is_cpu)
    staged.copy_(tensor, non_blocking=True)
    if not tensor.is_cpu:
        torch.cuda.current_stream(tensor.device).record_event().synchronize()
    return staged


class SerialCollectives(Collectives):
    """Collectives of a single rank: nothing to reduce, nothing to count."""

    def _group(self, ranks: tuple[int, ...], axes: Sequence[Axis] | None) -> Any:
        return None

    def _all_reduce(self, tensor: torch.Tensor, group: CollectiveGroup, operation: Operation) -> CollectiveHandle:
        raise GridError(f"{len(group.ranks)} ranks need collectives between them")

    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: CollectiveGroup) -> CollectiveHandle:
        raise GridError(f"{len(group.ranks)} ranks need collectives between them")


def job_collectives(grid: ProcessGrid, rank: int | None, device_type: str) -> Collectives:
    """Return the collectives of the running job on this rank; all ranks call it.

    `rank`: the expected rank of this process, if any. Raises `GridError` when the grid does not fit the job or this is
    another rank.
    """
    if grid.size == 1:
        return SerialCollectives(grid, 0)
    if not dist.is_initialized():
        raise GridError(
            f"the grid {grid} needs {grid.size} ranks, but torch.distributed is not initialised; start the job "
            "(torchrun, mpiexec) and call torch.distributed.init_process_group, or give collectives"
        )
    actual = dist.get_rank()
    if rank not in (None, actual):
        raise GridError(f"these are the parts of rank {rank}, but this is rank {actual}; each rank has its own")
    return TorchCollectives(grid, actual, device_type=device_type)


class _NothingToDo(CollectiveHandle):
    def wait(self) -> None:
        return None
