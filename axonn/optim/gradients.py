"""Reduction of gradients over the axes along which they are partial sums, as each parameter's placement states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from axonn.collectives import Collectives, Group, Work
from axonn.grid import Axis, ProcessGrid
from axonn.inter_layer.stage import ParameterSpec
from axonn.trace import SpanKind, SpanRecorder


class GradientReducer:
    """Sums gradients over replicas. What is summed must already be divided by the number of replicas.

    Parameters with the same partial axes share a flat buffer of which their `.grad` are views, reduced in chunks of
    `bucket_elements`; where nothing is partial, gradients are left to autograd.
    """

    def __init__(
        self,
        specs: Sequence[ParameterSpec],
        *,
        grid: ProcessGrid,
        rank: int,
        collectives: Collectives,
        bucket_elements: int = 1 << 22,
        spans: SpanRecorder | None = None,
    ) -> None:
        self._collectives = collectives
        self._spans = spans
        self._bucket = bucket_elements
        self._loose: list[torch.nn.Parameter] = []
        self._flat: list[tuple[Group, torch.Tensor]] = []
        by_axes: dict[tuple[Axis, ...], list[torch.nn.Parameter]] = {}
        for spec in specs:
            axes = tuple(a for a in spec.placement.partial if grid.extent(a) > 1)
            if axes:
                by_axes.setdefault(axes, []).append(spec.parameter)
            else:
                self._loose.append(spec.parameter)
        for axes, parameters in by_axes.items():
            self._flat.append((collectives.axis_group(axes), _flatten_gradients(parameters)))
        self._tied: list[tuple[Group, torch.nn.Parameter]] = []
        here = grid.coordinates(rank)
        for spec in specs:
            if spec.placement.tied_stages:
                ranks = tuple(
                    grid.rank(data=here.data, inter=stage, row=here.row, col=here.col)
                    for stage in spec.placement.tied_stages
                )
                self._tied.append((collectives.subset_group(ranks), spec.parameter))

    def zero(self) -> None:
        """Forget the gradients of the last batch."""
        for _, flat in self._flat:
            flat.zero_()
        for parameter in self._loose:
            parameter.grad = None

    def reduce(self) -> None:
        """All-reduce everything that is partial; every gradient is complete when this returns."""
        start = SpanRecorder.now()
        works: list[Work] = []
        for group, parameter in self._tied:
            assert parameter.grad is not None
            works.append(self._collectives.all_reduce(parameter.grad, group))
        # A tied gradient lies in the flat buffer too, so its own reduction comes first.
        for work in works:
            work.wait()
        reductions = [
            self._collectives.all_reduce(chunk, group)
            for group, flat in self._flat
            for chunk in torch.split(flat, self._bucket)
        ]
        for work in reductions:
            work.wait()
        if self._spans is not None and (works or reductions):
            self._spans.add(SpanKind.ALL_REDUCE, start, self._spans.now())


def _flatten_gradients(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """One zeroed buffer of which the parameters' gradients are views."""
    first = parameters[0]
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return flat
