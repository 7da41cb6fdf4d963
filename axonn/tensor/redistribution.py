"""Activations laid out another way: cut what is whole, gather what is cut, or cut along the other axis.

Normal and transposed layers alternate, so that a path needs none of this as long as its layers come in pairs. Where it
does not, these functions change the layout, forward and backward, by collectives that are counted like all others.
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
    """This rank's part along `axis` of dim `dim` of `x`, which is whole on every rank. The gradients are gathered.

    `segments`: lengths of the segments of the dim that are each cut by themselves, as in `Placement`. Raises
    `GridError` when one cannot be cut so.
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
    """The whole, on every rank, of what is cut along `axis` in dim `dim`. Its gradient is cut.

    `segments`: of the whole dim.
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
    """What is cut along `source` and repeated along `target`, cut along `target` and repeated along `source`.

    The gradient goes back the same way. `segments`: of the whole dim. Raises `GridError` when it cannot be cut along
    `target`.
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
    """Lengths of the whole segments."""
    size = x.shape[dim] * parts
    found: tuple[int, ...] = ()
    for axis in axes:
        found = segments_of(size, segments, context, axis, f"dim {dim} of a tensor {list(x.shape)}")
    return found


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
        ctx.how = dim, source, target, context, segments
        return _moved(x, dim, source, target, context, segments)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dim, source, target, context, segments = ctx.how
        return _moved(gradient, dim, target, source, context, segments), None, None, None, None, None


def _moved(
    x: torch.Tensor,
    dim: int,
    source: TensorAxis | None,
    target: TensorAxis | None,
    context: TensorContext,
    segments: tuple[int, ...],
) -> torch.Tensor:
    """Of n elements in the whole, s ranks along `source` and t along `target`, a gather moves (s - 1) / s n to each
    rank, all of which but n / t is dropped again. All ranks of the gather want the same part of it, so for t > 2 a sum
    of what each has of that part moves less: 2 (s - 1) / s n / t."""
    if context.extent(source) > 1 and context.extent(target) > 2:
        return _collected(x, dim, source, target, context, segments)
    whole = _gathered(x, dim, source, context, segments)
    return _cut(whole, dim, target, context, segments)


def _collected(
    x: torch.Tensor,
    dim: int,
    source: TensorAxis | None,
    target: TensorAxis | None,
    context: TensorContext,
    segments: tuple[int, ...],
) -> torch.Tensor:
    """The part along `target`, to which each rank along `source` contributes what it has of it."""
    shape = list(x.shape)
    shape[dim] = sum(segments) // context.extent(target)
    wanted = x.new_zeros(shape)
    here = there = 0
    for segment in segments:
        has, wants = (segment // context.extent(axis) for axis in (source, target))
        first, start = context.index(source) * has, context.index(target) * wants
        begin, end = max(first, start), min(first + has, start + wants)
        if begin < end:
            part = x.narrow(dim, here + begin - first, end - begin)
            wanted.narrow(dim, there + begin - start, end - begin).copy_(part)
        here, there = here + has, there + wants
    return context.all_reduce(wanted, source)


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
