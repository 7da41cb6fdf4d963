"""Context of the layers of one rank: its place on the grid, collectives along row and col, and the samples being
computed."""

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
    """Position of a forward in training, on which counter-based randomness depends beside seed and name."""

    step: int
    samples: Sequence[int]
    """Global numbers of the samples being computed."""


class Positions:
    """Position in training, separately for each thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def now(self) -> Position:
        """Position of the calling thread. Raises `ConfigError` outside of `at`."""
        position: Position | None = getattr(self._local, "position", None)
        if position is None:
            raise ConfigError("random layers need the position in training; call them inside of `positions.at(...)`")
        return position

    @contextmanager
    def at(self, step: int, samples: Sequence[int]) -> Iterator[None]:
        """Set the position to these samples in batch number `step` for forwards and recomputations inside the block."""
        previous = getattr(self._local, "position", None)
        self._local.position = Position(step, samples)
        try:
            yield
        finally:
            self._local.position = previous


@dataclass(frozen=True, kw_only=True)
class TaskSpans:
    """Record of the collectives and compute turns of one task of a schedule."""

    microbatch: int
    layer: int
    """First layer of the chunk."""
    chunk: int
    blocked: list[tuple[DeviceEvent, DeviceEvent]] = field(default_factory=list)
    """Intervals in which this rank waited for a collective with nothing else to compute, in order; empty without spans.
    An interval of length zero marks that the next sub-shard began without a wait."""
    turns: list[int] = field(default_factory=list)
    """Sub-shard that computed first, and the one that went on after each interval; -1 if there is only one."""


class AsyncCollective:
    """A collective along a tensor axis, started by calling `issue`; with None there is nothing to do."""

    def __init__(self, issue: Callable[[], CollectiveHandle] | None, context: TensorContext) -> None:
        self._context = context
        self._started = context.timeline.now() if context.timed else None
        self._work = None if issue is None else issue()

    def wait(self) -> None:
        """Let the other lanes compute, then wait until the result is in the tensor."""
        if self._work is not None:
            self._context.lanes.switch()
            self._context._finish(self._work, self._started)
            self._work = None


class TensorContext:
    """Context of tensor parallelism on one rank. `collectives` is needed when G_tensor > 1.

    An axis of None means "not cut": its extent is 1. Raises `ConfigError` without the collectives it needs.
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
        self.coordinates = grid.coordinates(rank)
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
        """Return the same object: copies of a layer stay on the same rank of the job."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        rank = self.grid.rank(**self.coordinates._asdict())
        return _in_running_job, (self.grid, rank, self.seed, self.collectives.device_type)

    @classmethod
    def serial(cls, *, seed: int = 0) -> TensorContext:
        """Return the context of a single process."""
        return cls(ProcessGrid(), seed=seed)

    def extent(self, axis: TensorAxis | None) -> int:
        """Return the number of ranks along `axis`."""
        return 1 if axis is None else self.grid.extent(axis)

    def index(self, axis: TensorAxis | None) -> int:
        """Return this rank's index along `axis`."""
        return 0 if axis is None else int(getattr(self.coordinates, axis))

    def part(self, size: int, axis: TensorAxis | None, label: str) -> int:
        """Return a rank's part of `size`, which is called `label`. Raises `GridError` when it does not divide."""
        extent = self.extent(axis)
        if size % extent:
            divisors = [n for n in range(1, min(size, self.grid.size) + 1) if size % n == 0]
            raise GridError(
                f"{label} ({size}) cannot be cut along {axis} = {extent}; set G_{axis} to one of {divisors}, "
                f"or {label} to a multiple of {extent}"
            )
        return size // extent

    @contextmanager
    def task(self, *, microbatch: int, layer: int, chunk: int) -> Iterator[TaskSpans]:
        """Record collectives as those of this task inside the block; outside of any task they are not recorded."""
        self._task = TaskSpans(microbatch=microbatch, layer=layer, chunk=chunk)
        try:
            yield self._task
        finally:
            self._task = None

    def begin_sub_shard(self) -> None:
        """Note that the calling lane begins to compute its sub-shard of the task."""
        task, lane = self._task, self.lanes.lane
        if self.timed and task is not None and lane is not None:
            if task.turns:
                now = self.timeline.now()
                task.blocked.append((now, now))
            task.turns.append(lane)

    def start_all_reduce(
        self, tensor: torch.Tensor, axis: TensorAxis | None, operation: Operation = "sum"
    ) -> AsyncCollective:
        """Start an all-reduce of contiguous `tensor` in place along `axis`."""
        group = self._group(axis)
        return AsyncCollective(
            None if group is None else partial(self.collectives.all_reduce, tensor, group, operation), self
        )

    def all_reduce(self, tensor: torch.Tensor, axis: TensorAxis | None, operation: Operation = "sum") -> torch.Tensor:
        """All-reduce contiguous `tensor` in place along `axis`, while other lanes compute; return it."""
        self.start_all_reduce(tensor, axis, operation).wait()
        return tensor

    def all_gather(self, tensor: torch.Tensor, axis: TensorAxis | None) -> torch.Tensor:
        """Return the tensors of all ranks along `axis`, in their order: [extent, *shape]."""
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
        """True while collectives are recorded."""
        return self.timeline.timed and self._task is not None

    def _finish(self, work: CollectiveHandle, started: DeviceEvent | None) -> None:
        task, timeline = self._task, self.timeline
        if task is None or started is None:
            work.wait()
            return
        begin = timeline.now()
        finished = timeline.result_of(work)
        end = timeline.now()
        lane = self.lanes.lane
        shard = -1 if lane is None else lane
        if not task.turns:
            task.turns.append(shard)
        task.blocked.append((begin, end))
        task.turns.append(shard)
        # The backend's thread may stamp the completion later than this thread sees it.
        if finished.event is None and finished.at > end.at:
            finished = end
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
    """Return the context of `rank` for layers that are unpickled; all ranks unpickle theirs together."""
    return TensorContext(grid, rank, job_collectives(grid, rank, device_type), seed=seed)
