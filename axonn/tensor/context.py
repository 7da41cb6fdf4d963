"""What the layers of one rank know of the grid: their place in it, collectives along row and col, and the samples that
are being computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from axonn.device.compilation import Compiler
from axonn.device.streams import DeviceEvent, Timeline
from axonn.distributed.collectives import (
    CollectiveGroup,
    CollectiveHandle,
    Collectives,
    Operation,
    SerialCollectives,
    job_collectives,
)
from axonn.errors import ConfigError, GridError
from axonn.grid import ProcessGrid
from axonn.spans import SpanKind
from axonn.tensor.overdecomposition import Lanes

TensorAxis = Literal["row", "col"]


class Position(NamedTuple):
    """Where in a training a forward is: what counter-based randomness depends on beside seed and name."""

    step: int
    samples: Sequence[int]
    """Global numbers of the rows that are being computed."""


class Positions:
    """The position of the thread that asks."""

    def __init__(self) -> None:
        self._mine = threading.local()

    @property
    def now(self) -> Position:
        """Raises `ConfigError` when nobody has said it."""
        position: Position | None = getattr(self._mine, "position", None)
        if position is None:
            raise ConfigError("random layers need the position in training; call them inside of `positions.at(...)`")
        return position

    @contextmanager
    def at(self, step: int, samples: Sequence[int]) -> Iterator[None]:
        """Inside of the block, forwards and recomputations are of these samples in batch number `step`."""
        before = getattr(self._mine, "position", None)
        self._mine.position = Position(step, samples)
        try:
            yield
        finally:
            self._mine.position = before


@dataclass(frozen=True, kw_only=True)
class TaskSpans:
    """The task of a schedule whose collectives are recorded."""

    microbatch: int
    layer: int
    """First layer of the chunk."""
    chunk: int
    blocked: list[tuple[DeviceEvent, DeviceEvent]] = field(default_factory=list)
    """When this rank waited for a collective with nothing else to compute, in order; nothing without spans. Of no
    length where the next sub-shard began without."""
    turns: list[int] = field(default_factory=list)
    """The sub-shard that computed first, and those that went on after each of these; -1 where there is only one."""


class AsyncCollective:
    """A collective along a tensor axis, under way once `issue` has been called; None: there is none."""

    def __init__(self, issue: Callable[[], CollectiveHandle] | None, context: TensorContext) -> None:
        self._context = context
        self._started = context.timeline.now() if context.timed else None
        self._work = None if issue is None else issue()

    def wait(self) -> None:
        """Let the other lanes compute, then return when the result is in the tensor."""
        if self._work is not None:
            self._context.lanes.switch()
            self._context._finish(self._work, self._started)
            self._work = None


class TensorContext:
    """One rank's means of tensor parallelism. `collectives` is needed when G_tensor > 1.

    An axis of None means "not cut": extent 1.
    """

    def __init__(
        self,
        grid: ProcessGrid,
        rank: int = 0,
        collectives: Collectives | None = None,
        *,
        seed: int = 0,
        timeline: Timeline | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        if collectives is None:
            if grid.tensor > 1:
                raise ConfigError(f"tensor parallelism on {grid} needs collectives")
            collectives = SerialCollectives(grid, rank)
        self.grid = grid
        self.here = grid.coordinates(rank)
        self.seed = seed
        self.timeline = timeline or Timeline(torch.device("cpu"), None)
        self.lanes = Lanes(self.timeline.device)
        self.positions = Positions()
        self.compiler = compiler or Compiler()
        self._task: TaskSpans | None = None
        self.collectives = collectives
        self._groups: dict[TensorAxis, CollectiveGroup] = {}
        for axis in ("row", "col"):
            if grid.extent(axis) > 1:
                self._groups[axis] = collectives.axis_group([axis])

    def __deepcopy__(self, memo: object) -> TensorContext:
        """The same object: a rank has one place in its job, whatever copies of its layers there are."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        rank = self.grid.rank(**self.here._asdict())
        return _in_running_job, (self.grid, rank, self.seed, self.collectives.device_type)

    @classmethod
    def serial(cls, *, seed: int = 0) -> TensorContext:
        """That of a process by itself."""
        return cls(ProcessGrid(), seed=seed)

    def extent(self, axis: TensorAxis | None) -> int:
        """Number of ranks along `axis`."""
        return 1 if axis is None else self.grid.extent(axis)

    def index(self, axis: TensorAxis | None) -> int:
        """This rank's number along `axis`."""
        return 0 if axis is None else int(getattr(self.here, axis))

    def part(self, size: int, axis: TensorAxis | None, what: str) -> int:
        """A rank's part of `size`. Raises `GridError` when it does not divide; `what` says of what it is the size."""
        extent = self.extent(axis)
        if size % extent:
            divisors = [n for n in range(1, min(size, self.grid.size) + 1) if size % n == 0]
            raise GridError(
                f"{what} ({size}) cannot be cut along {axis} = {extent}; set G_{axis} to one of {divisors}, "
                f"or {what} to a multiple of {extent}"
            )
        return size // extent

    @contextmanager
    def task(self, *, microbatch: int, layer: int, chunk: int) -> Iterator[TaskSpans]:
        """Inside of the block, collectives are those of this task; outside of any, they are not recorded."""
        self._task = TaskSpans(microbatch=microbatch, layer=layer, chunk=chunk)
        try:
            yield self._task
        finally:
            self._task = None

    def begin_sub_shard(self) -> None:
        """Say that the calling lane begins to compute its sub-shard of the task."""
        task, lane = self._task, self.lanes.lane
        if self.timed and task is not None and lane is not None:
            if task.turns:
                now = self.timeline.now()
                task.blocked.append((now, now))
            task.turns.append(lane)

    def start_all_reduce(
        self, tensor: torch.Tensor, axis: TensorAxis | None, operation: Operation = "sum"
    ) -> AsyncCollective:
        """Start reducing contiguous `tensor` in place along `axis`."""
        group = self._group(axis)
        return AsyncCollective(
            None if group is None else partial(self.collectives.all_reduce, tensor, group, operation), self
        )

    def all_reduce(self, tensor: torch.Tensor, axis: TensorAxis | None, operation: Operation = "sum") -> torch.Tensor:
        """Reduce contiguous `tensor` in place along `axis`, other lanes computing meanwhile; returns it."""
        self.start_all_reduce(tensor, axis, operation).wait()
        return tensor

    def all_gather(self, tensor: torch.Tensor, axis: TensorAxis | None) -> torch.Tensor:
        """[extent of `axis`, *shape]: the tensors of all ranks along it, in their order."""
        group = self._group(axis)
        if group is None:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty(len(group.ranks), *tensor.shape)
        AsyncCollective(partial(self.collectives.all_gather, gathered, tensor.contiguous(), group), self).wait()
        return gathered

    def _group(self, axis: TensorAxis | None) -> CollectiveGroup | None:
        return None if axis is None else self._groups.get(axis)

    @property
    def timed(self) -> bool:
        """Whether collectives are recorded now."""
        return self.timeline.timed and self._task is not None

    def _finish(self, work: CollectiveHandle, started: DeviceEvent | None) -> None:
        task, timeline = self._task, self.timeline
        if task is None or started is None:
            work.wait()
            return
        before = timeline.now()
        finished = timeline.result_of(work)
        after = timeline.now()
        lane = self.lanes.lane
        shard = -1 if lane is None else lane
        if not task.turns:
            task.turns.append(shard)
        task.blocked.append((before, after))
        task.turns.append(shard)
        # The backend's thread may say a moment later than this one that it is done.
        if finished.event is None and finished.at > after.at:
            finished = after
        timeline.span(
            SpanKind.TENSOR,
            started,
            finished,
            microbatch=task.microbatch,
            layer=task.layer,
            chunk=task.chunk,
            shard=shard,
        )


def _in_running_job(grid: ProcessGrid, rank: int, seed: int, device_type: str) -> TensorContext:
    """The context of `rank` where its layers are loaded from a file; all ranks load theirs together."""
    return TensorContext(grid, rank, job_collectives(grid, rank, device_type), seed=seed)
