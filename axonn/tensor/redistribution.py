"""Redistribution of activations: split a whole one, gather a cut one, or move the cut to the other axis.

Normal and transposed layers alternate, so a path whose layers come in pairs needs no redistribution. Elsewhere these
functions change the layout, forward and backward, by collectives that are counted like all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from axonn.tensor.context import TensorAxis, TensorContext
from axonn.tensor.layers.layer import segments_of


def split(
    x: torch.Tensor,
    dim: int,
    axis: TensorAxis | None,
    *,
    context: TensorContext,
    segments: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return this rank's part, along `axis`, of dim `dim` of `x`, which is whole on every rank; gather the gradient.

    `segments`: lengths of the segments of the dim that are each cut by themselves, as in `Placement`. Raises
    `GridError` when one is not divisible.
    """
    lengths = _lengths(x, dim, 1, segments, context, (axis,))
    return _apply(x, dim, None, axis, context, lengths)


def gather(
    x: torch.Tensor,
    dim: int,
    axis: TensorAxis | None,
    *,
    context: TensorContext,
    segments: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the whole of `x`, which is cut along `axis` in dim `dim`, on every rank; split the gradient.

    `segments`: lengths of the segments of the whole dim.
    """
    lengths = _lengths(x, dim, context.extent(axis), segments, context, (axis,))
    return _apply(x, dim, axis, None, context, lengths)


def redistribute(
    x: torch.Tensor,
    dim: int,
    *,
    source: TensorAxis | None,
    target: TensorAxis | None,
    context: TensorContext,
    segments: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return `x`, cut along `source` and repeated along `target`, cut along `target` and repeated along `source`.

    The gradient is redistributed the other way. `segments`: lengths of the segments of the whole dim. Raises
    `GridError` when one is not divisible by `target`.
    """
    lengths = _lengths(x, dim, context.extent(source), segments, context, (source, target))
    return _apply(x, dim, source, target, context, lengths)


def _lengths(
    x: torch.Tensor,
    dim: int,
    parts: int,
    segments: Sequence[int] | None,
    context: TensorContext,
    axes: tuple[TensorAxis | None, ...],
) -> tuple[int, ...]:
    """Return the lengths of the whole segments, checked against `axes`."""
    size = x.shape[dim] * parts
    lengths: tuple[int, ...] = ()
    for axis in axes:
        lengths = segments_of(size, segments, context, axis, f"dim {dim} of a tensor {list(x.shape)}")
    return lengths


def _apply(
    x: torch.Tensor,
    dim: int,
    source: TensorAxis | None,
    target: TensorAxis | None,
    context: TensorContext,
    segments: tuple[int, ...],
) -> torch.Tensor:
    if source == target or context.extent(source) == context.extent(target) == 1:
        return x
    y: torch.Tensor = _Redistribute.apply(x, dim, source, target, context, segments)  # type: ignore[no-untyped-call]
    return y


class _Redistribute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dim: int,
        source: TensorAxis | None,
        target: TensorAxis | None,
        context: TensorContext,
        segments: tuple[int, ...],
    ) -> torch.Tensor:
        ctx.arguments = dim, source, target, context, segments
        return _redistributed(x, dim, source, target, context, segments)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dim, source, target, context, segments = ctx.arguments
        return _redistributed(grad_output, dim, target, source, context, segments), None, None, None, None, None


def _redistributed(
    x: torch.Tensor,
    dim: int,
    source: TensorAxis | None,
    target: TensorAxis | None,
    context: TensorContext,
    segments: tuple[int, ...],
) -> torch.Tensor:
    """Move the cut of `x` from `source` to `target` with the collective that sends less.

    With n elements in the whole, s ranks along `source` and t along `target`, an all-gather moves (s - 1) / s n to each
    rank, of which all but n / t is dropped again. All ranks of the all-gather keep the same part, so for t > 2 an
    all-reduce of that part, to which each rank contributes what it has, moves less: 2 (s - 1) / s n / t.
    """
    if context.extent(source) > 1 and context.extent(target) > 2:
        return _summed_part(x, dim, source, target, context, segments)
    gathered = _gathered(x, dim, source, context, segments)
    return _cut(gathered, dim, target, context, segments)


def _summed_part(
    x: torch.Tensor,
    dim: int,
    source: TensorAxis | None,
    target: TensorAxis | None,
    context: TensorContext,
    segments: tuple[int, ...],
) -> torch.Tensor:
    """Return the part along `target` as a sum, to which each rank along `source` contributes what it has of it."""
    shape = list(x.shape)
    shape[dim] = sum(segments) // context.extent(target)
    target_part = x.new_zeros(shape)
    source_start = target_start = 0
    for segment in segments:
        source_length, target_length = (segment // context.extent(axis) for axis in (source, target))
        first, start = context.index(source) * source_length, context.index(target) * target_length
        begin, end = max(first, start), min(first + source_length, start + target_length)
        if begin < end:
            overlap = x.narrow(dim, source_start + begin - first, end - begin)
            target_part.narrow(dim, target_start + begin - start, end - begin).copy_(overlap)
        source_start, target_start = source_start + source_length, target_start + target_length
    return context.all_reduce(target_part, source)


def _gathered(
    x: torch.Tensor, dim: int, axis: TensorAxis | None, context: TensorContext, segments: tuple[int, ...]
) -> torch.Tensor:
    extent = context.extent(axis)
    if extent == 1:
        return x
    lengths = [segment // extent for segment in segments]
    parts = [torch.split(part, lengths, dim) for part in context.all_gather(x, axis).unbind(0)]
    return torch.cat([part[i] for i in range(len(segments)) for part in parts], dim)


def _cut(
    x: torch.Tensor, dim: int, axis: TensorAxis | None, context: TensorContext, segments: tuple[int, ...]
) -> torch.Tensor:
    extent, index = context.extent(axis), context.index(axis)
    if extent == 1:
        return x
    return torch.cat([segment.chunk(extent, dim)[index] for segment in torch.split(x, list(segments), dim)], dim)
