"""All-reduces of gradients over the axes along which they are partial sums, as each parameter's placement states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from axonn.device.streams import DeviceEvent, Timeline
from axonn.distributed.collectives import CollectiveGroup, CollectiveHandle, Collectives, Operation
from axonn.errors import ConfigError
from axonn.grid import AXES, TENSOR_AXES, Axis, ProcessGrid
from axonn.optim.exact_sum import from_digits, to_digits
from axonn.optim.flat_buffers import FlatEntry, FlatParameters, ReductionChunk, pieces
from axonn.spans import SpanKind

_NORM_AXES: tuple[Axis, ...] = ("inter", *TENSOR_AXES)
"""Axes along which ranks hold different parameters, or different parts of them."""


class Reduction:
    """An all-reduce under way. `before`: the one that is ahead of it on the wire. `kind`: of its span."""

    def __init__(
        self,
        work: CollectiveHandle | None,
        started: DeviceEvent,
        timeline: Timeline,
        before: Reduction | None = None,
        *,
        kind: SpanKind = SpanKind.ALL_REDUCE,
    ) -> None:
        self._work = work
        self._started = started
        self._timeline = timeline
        self._before = before
        self._kind = kind
        self._finished: DeviceEvent | None = None

    def wait(self) -> DeviceEvent:
        """Let the current stream go on when the result is there, as those of the all-reduces before it."""
        if self._finished is not None:
            return self._finished
        start = self._started
        if self._before is not None:
            start = self._timeline.later(start, self._before.wait())
            self._before = None
        if self._work is None:
            self._finished = self._started
            return self._finished
        # What finished before the one ahead of it had the wire to itself no time at all.
        self._finished = self._timeline.later(start, self._timeline.result_of(self._work))
        self._timeline.span(self._kind, start, self._finished)
        return self._finished


class GradientReduction:
    """The collectives of a step. What they sum must already be divided by the number of replicas.

    `ties`: the stages of each tied parameter of the whole model, the same on every rank.
    """

    def __init__(
        self,
        flat: FlatParameters,
        chunks: Sequence[ReductionChunk],
        *,
        ties: Sequence[tuple[int, ...]],
        grid: ProcessGrid,
        rank: int,
        collectives: Collectives,
        timeline: Timeline,
    ) -> None:
        self._flat = flat
        self._chunks = chunks
        self._collectives = collectives
        self._timeline = timeline
        self._groups: dict[tuple[Axis, ...], CollectiveGroup] = {}
        for chunk in chunks:
            if chunk.axes and chunk.axes not in self._groups:
                self._groups[chunk.axes] = collectives.axis_group(chunk.axes)
        here = grid.coordinates(rank)._asdict()
        groups = {stages: collectives.stage_group(stages) for stages in ties}
        self._tied: list[tuple[CollectiveGroup, torch.Tensor]] = []
        for entry in flat.entries:
            stages = entry.spec.placement.tied_stages
            if stages:
                group = groups.get(stages)
                if group is None:
                    raise ConfigError(f"'{entry.spec.name}' is tied over stages {stages}, which `ties` must list")
                self._tied.append((group, flat.gradients[entry.where]))
        self._world = collectives.axis_group(AXES) if grid.size > 1 else None
        norm_axes = [axis for axis in _NORM_AXES if grid.extent(axis) > 1]
        self._model = collectives.axis_group(norm_axes) if norm_axes else None
        self._counted = _counted_here(flat.entries, here)

    def complete_locally(self) -> None:
        """Add up the gradients that this rank, or the stages that hold a tied parameter, have of the same parameter."""
        self._flat.add_shared_gradients()
        for reduction in self._start(self._tied):
            reduction.wait()

    def start(self) -> list[Reduction]:
        """Start reducing all chunks, in order; one handle for each."""
        return self._start(
            [
                (self._groups[chunk.axes] if chunk.axes else None, self._flat.gradients[chunk.where])
                for chunk in self._chunks
            ]
        )

    def overflow(self, *, largest: float, replicas: int) -> torch.Tensor:
        """float32 [1], on the device: 1 where on any rank a gradient is not finite or so large that the sum of
        `replicas` like it may exceed `largest`, else 0. So no all-reduce can overflow where this says 0. All ranks get
        the same answer."""
        flag = torch.zeros(1, dtype=torch.float32, device=self._flat.gradients.device)
        if self._flat.elements:
            low, high = torch.aminmax(self._flat.gradients)
            peak = torch.maximum(-low, high).double() * replicas
            # NaN compares as false.
            flag.copy_(~(peak <= largest))
        self._agree(flag, self._world, "max")
        return flag

    def norm(self, length: int) -> torch.Tensor:
        """float64 [1], on the device: norm of the reduced gradient of the whole model, each parameter counted once,
        from parts of `length`.

        A part ends where its parameter ends, and squares of parts add up exactly: how the layers lie on stages changes
        no bit.
        """
        gradients = self._flat.gradients
        # Half types add up in float32, the parts in float64.
        dtype = torch.promote_types(gradients.dtype, torch.float32)
        parts = [gradients[part] for whole in self._counted for part in pieces(whole, length)]
        squares = torch.zeros(0, dtype=torch.float64, device=gradients.device)
        if parts:
            squares = torch.stack(torch._foreach_norm(parts, dtype=dtype)).double().square()
        digits = to_digits(squares)
        self._agree(digits, self._model, "sum")
        return from_digits(digits).sqrt_()

    def _agree(self, value: torch.Tensor, group: CollectiveGroup | None, operation: Operation) -> None:
        if group is not None:
            started = self._timeline.now()
            work = self._collectives.all_reduce(value, group, operation)
            # A single number: what takes time is the ranks that are not done yet.
            Reduction(work, started, self._timeline, kind=SpanKind.IDLE).wait()

    def _start(self, parts: Sequence[tuple[CollectiveGroup | None, torch.Tensor]]) -> list[Reduction]:
        reductions: list[Reduction] = []
        for group, gradient in parts:
            started = self._timeline.now()
            work = None if group is None else self._collectives.all_reduce(gradient, group)
            before = reductions[-1] if reductions else None
            reductions.append(Reduction(work, started, self._timeline, before))
        return reductions


def _counted_here(entries: Sequence[FlatEntry], here: dict[str, int]) -> list[slice]:
    """Elements that this rank adds to the norm: of each parameter, one of the ranks that hold it."""
    counted: list[slice] = []
    for entry in entries:
        placement = entry.spec.placement
        # Stages hold different parameters, except where the placement sums their gradients.
        axes = {*TENSOR_AXES, *placement.partial} - {"data", *placement.cut_axes}
        replicated = any(here[axis] for axis in axes)
        stages = placement.tied_stages
        if not replicated and not (stages and here["inter"] != min(stages)):
            counted.append(entry.where)
    return counted
