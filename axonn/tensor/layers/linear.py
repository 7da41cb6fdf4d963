"""Tensor-parallel `nn.Linear`; the all-reduce of its input gradient overlaps with computing its weight gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from axonn.tensor.autocast import product_inputs, without_autocast
from axonn.tensor.context import TensorContext
from axonn.tensor.gradient_accumulation import WeightGradients, add_gradient, add_product
from axonn.tensor.layers.layer import NORMAL, Layout, TensorLayer, check_layout, cut, segments_of


class Linear(TensorLayer):
    """`nn.Linear` with its weight [out, in] cut in both dims: [..., in / G_in] -> [..., out / G_out].

    Singh & Bhatele, arXiv 2305.13525, after Agarwal et al., IBM J. R&D 39(5), 1995: each rank multiplies its part. The
    output is all-reduced along the axis of the input; the input gradient is all-reduced along the axis of the output
    while the weight gradient, which needs no reduction, is computed. The bias is cut like the output and added after
    the reduction.

    `in_segments`, `out_segments`: segments of the features that are each cut by themselves. Raises `GridError` when the
    features cannot be cut so.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        context: TensorContext,
        layout: Layout = NORMAL,
        in_segments: Sequence[int] | None = None,
        out_segments: Sequence[int] | None = None,
    ) -> None:
        super().__init__(context)
        self.in_features = in_features
        self.out_features = out_features
        self.layout = layout
        label = f"Linear({in_features}, {out_features})"
        check_layout(layout, label)
        rows = segments_of(in_features, in_segments, context, layout.input, f"in_features of {label}")
        columns = segments_of(out_features, out_segments, context, layout.output, f"out_features of {label}")
        out = cut(0, layout.output, columns)
        shape = (out_features, in_features)
        self.place("weight", shape, out, cut(1, layout.input, rows), device=device, dtype=dtype)
        if bias:
            self.place("bias", (out_features,), out, device=device, dtype=dtype)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(
            x, self.weight, self.bias, context=self.context, layout=self.layout, weight_gradients=self.weight_gradients
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, layout={tuple(self.layout)}"


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    context: TensorContext,
    layout: Layout,
    weight_gradients: WeightGradients | None = None,
) -> torch.Tensor:
    """Compute what `Linear` does, with this rank's parts of weight and bias: [..., in / G_in] -> [..., out / G_out].

    With `weight_gradients`, `weight` and `bias` are parameters whose gradients are accumulated there.
    """
    if weight_gradients is None and context.grid.tensor == 1:
        return F.linear(x, weight, bias)
    # Gradients accumulated in place are computed in the parameters' own type.
    operands = (x, weight, bias) if weight_gradients is not None else product_inputs(x, weight, bias)
    with without_autocast(x):
        y: torch.Tensor = _Linear.apply(*operands, context, layout, weight_gradients)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        context: TensorContext,
        layout: Layout,
        queue: WeightGradients | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        # `accumulate` adds to the `.grad` of the parameters themselves, not of the tensors that autograd saves.
        ctx.parameters = None if queue is None else (weight, bias)
        ctx.context, ctx.layout, ctx.queue = context, layout, queue
        if context.extent(layout.input) == 1:
            return F.linear(x, weight, bias)
        y = context.all_reduce(F.linear(x, weight), layout.input)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        reduction = grad_input = grad_weight = grad_bias = None
        if needs_input:
            grad_input = grad_output @ weight
            reduction = ctx.context.start_all_reduce(grad_input, ctx.layout.output)
        rows, inputs = grad_output.reshape(-1, grad_output.shape[-1]), x.reshape(-1, x.shape[-1])

        def accumulate() -> None:
            if needs_weight:
                add_product(ctx.parameters[0], rows.t(), inputs)
            if needs_bias:
                add_gradient(ctx.parameters[1], rows.sum(0))

        if ctx.queue is not None:
            ctx.queue.add(accumulate)
        else:
            grad_weight = rows.t() @ inputs if needs_weight else None
            grad_bias = rows.sum(0) if needs_bias else None
        if reduction is not None:
            reduction.wait()
        return grad_input, grad_weight, grad_bias, None, None, None
