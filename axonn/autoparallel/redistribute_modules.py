"""Modules that redistribute an activation, and the collectives they issue."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from axonn.autoparallel.layouts.shardings import Form, Repeated, Shard, State, Wanted, describe
from axonn.autoparallel.parallel_report import SentCollective
from axonn.tensor.context import TensorAxis, TensorContext
from axonn.tensor.redistribution import gather, redistribute, split


class Redistribute(nn.Module):
    """Redistribution of an activation from layout `source` to layout `target`."""

    def __init__(self, source: State, target: Wanted, context: TensorContext) -> None:
        super().__init__()
        self.source = source
        self.target = target
        self.context = context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        source, target, context = self.source, self.target, self.context
        if source is not None and isinstance(target, Shard) and source.form == target.form:
            form = source.form
            return redistribute(
                x, form.dim, source=source.axis, target=target.axis, context=context, segments=_segments(form)
            )
        if source is not None:
            x = gather(x, source.form.dim, source.axis, context=context, segments=_segments(source.form))
        if isinstance(target, Shard):
            return split(x, target.form.dim, target.axis, context=context, segments=_segments(target.form))
        if isinstance(target, Repeated):
            y: torch.Tensor = _Repeat.apply(x, target.axis, context)  # type: ignore[no-untyped-call]
            return y
        return x

    def extra_repr(self) -> str:
        return f"{describe(self.source)} -> {describe(self.target)}"


def redistribution_collectives(
    size: int, has_gradient: bool, source: State, target: Wanted, context: TensorContext
) -> tuple[list[SentCollective], list[SentCollective]]:
    """Return the collectives, forward and backward, of a `Redistribute` of a whole value of `size` elements."""
    if source == target:
        return [], []
    if source is not None and isinstance(target, Shard) and source.form == target.form:
        return [_moved(size, source, target, context)], [_moved(size, target, source, context)] if has_gradient else []
    forward, backward = [], []
    if source is not None:
        forward.append(SentCollective("all-gather", source.axis, size // context.extent(source.axis)))
    if isinstance(target, Shard) and has_gradient:
        backward.append(SentCollective("all-gather", target.axis, size // context.extent(target.axis)))
    if isinstance(target, Repeated) and has_gradient:
        backward.append(SentCollective("all-reduce sum", target.axis, size))
    return forward, backward


def elements_received(call: SentCollective, context: TensorContext) -> float:
    """Return the elements that a rank receives in a collective, with the ring algorithm."""
    extent = context.extent(call.axis)
    return call.elements * (extent - 1 if call.kind == "all-gather" else 2 * (extent - 1) / extent)


def _moved(size: int, source: Shard, target: Shard, context: TensorContext) -> SentCollective:
    """Return the collective by which `redistribute` moves the cut."""
    if context.extent(target.axis) > 2:
        return SentCollective("all-reduce sum", source.axis, size // context.extent(target.axis))
    return SentCollective("all-gather", source.axis, size // context.extent(source.axis))


def _segments(form: Form) -> tuple[int, ...] | None:
    """Return the segments if there are several, which keep the example's lengths; a single one may have any length."""
    return None if len(form.segments) == 1 else form.segments


class _Repeat(torch.autograd.Function):
    """Identity on a whole tensor used by shards along `axis`; all-reduces the gradients, which are partial sums."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: TensorAxis, context: TensorContext) -> torch.Tensor:
        ctx.arguments = axis, context
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        axis, context = ctx.arguments
        return context.all_reduce(grad_output.clone(memory_format=torch.contiguous_format), axis), None, None
