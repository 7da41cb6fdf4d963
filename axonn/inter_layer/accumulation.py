"""Weight gradients accumulated where they lie: the product of a microbatch is added to `.grad` as it is computed.

Autograd computes each microbatch's weight gradient into new memory and then adds it to `.grad`: for a Linear one write
and one read of the whole gradient too many, for an Embedding a dense gradient of which few rows are not zero.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class _Linear(torch.autograd.Function):
    """`F.linear` whose backward adds to the gradients of weight and bias itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> torch.Tensor:
        ctx.save_for_backward(x)
        # The parameters themselves, not the tensors that autograd saves for them: their `.grad` is what counts.
        ctx.weight, ctx.bias = weight, bias
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        rows = gradient.reshape(-1, gradient.shape[-1])
        inputs = x.reshape(-1, x.shape[-1])
        if weight.requires_grad:
            if weight.grad is None:
                weight.grad = rows.t() @ inputs
            else:
                weight.grad.addmm_(rows.t(), inputs)
        if bias is not None and bias.requires_grad:
            if bias.grad is None:
                bias.grad = rows.sum(0)
            else:
                bias.grad += rows.sum(0)
        return (gradient @ weight if ctx.needs_input_grad[0] else None), None, None


class _Embedding(torch.autograd.Function):
    """`F.embedding` whose backward adds the rows it looked up to the gradient of the weight itself."""

    @staticmethod
    def forward(ctx: Any, index: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.weight = weight
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        (index,) = ctx.saved_tensors
        weight = ctx.weight
        if weight.requires_grad:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.index_add_(0, index.reshape(-1), gradient.reshape(-1, gradient.shape[-1]))
        return None, None


def _linear(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
    return y


def _embedding(self: nn.Embedding, index: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = _Embedding.apply(index, self.weight)  # type: ignore[no-untyped-call]
    return y


def accumulate_in_place(module: nn.Module) -> nn.Module:
    """Let every plain `nn.Linear` and `nn.Embedding` inside `module` add to its gradients in place; returns `module`.

    Subclasses, and embeddings with padding, norm limits or sparse gradients, are left as they are.
    """
    for part in module.modules():
        if type(part) is nn.Linear:
            part.forward = MethodType(_linear, part)  # type: ignore[method-assign]
        elif type(part) is nn.Embedding and not (
            part.sparse or part.scale_grad_by_freq or part.padding_idx is not None or part.max_norm is not None
        ):
            part.forward = MethodType(_embedding, part)  # type: ignore[method-assign]
    return module
