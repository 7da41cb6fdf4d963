"""The modules that lay an activation out another way, and what they send."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from axonn.autoparallel.layouts.shardings import Form, Repeated, Shard, State, Wanted, describe
from axonn.autoparallel.parallel_report import SentCollective
from axonn.tensor.context import TensorAxis, TensorContext
from axonn.tensor.redistribution import gather, redistribute, split


class Change(nn.Module):
    """Lays out as `target` says what lies as `source` says."""

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


def sent(
    size: int, has_gradient: bool, source: State, target: Wanted, context: TensorContext
) -> tuple[list[SentCollective], list[SentCollective]]:
    """The collectives, forward and backward, of a `Change` of a value of `size` elements in the whole."""
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


def received(call: SentCollective, context: TensorContext) -> float:
    """Elements that a rank receives in it, as in a ring."""
    extent = context.extent(call.axis)
    return call.elements * (extent - 1 if call.kind == "all-gather" else 2 * (extent - 1) / extent)


def _moved(size: int, source: Shard, target: Shard, context: TensorContext) -> SentCollective:
    """As `redistribute` does it."""
    if context.extent(target.axis) > 2:
        return SentCollective("all-reduce sum", source.axis, size // context.extent(target.axis))
    return SentCollective("all-gather", source.axis, size // context.extent(source.axis))


def _segments(form: Form) -> tuple[int, ...] | None:
    """Several segments have the lengths of the example; one may have any."""
    return None if len(form.segments) == 1 else form.segments


class _Repeat(torch.autograd.Function):
    """Hands a whole tensor to something that is cut along `axis`: the gradients of the ranks are parts of a sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: TensorAxis, context: TensorContext) -> torch.Tensor:
        ctx.how = axis, context
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        axis, context = ctx.how
        return context.all_reduce(gradient.clone(memory_format=torch.contiguous_format), axis), None, None
