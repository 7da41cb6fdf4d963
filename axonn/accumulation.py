"""Weight gradients accumulated where they lie: the product of a microbatch is added to `.grad` as it is computed.

Autograd computes each microbatch's weight gradient into new memory and then adds it to `.grad`: for a Linear one write
and one read of the whole gradient too many, for an Embedding a dense gradient of which few rows are not zero.

It also lets a backward be split (zero-bubble schedules: Qi et al., arXiv 2401.10241): the gradients of the weights can
wait in a queue while the gradient of the input is already on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class WeightGradients:
    """The weight gradients of a chunk: computed at once, or kept for later while `deferring` is set."""

    def __init__(self) -> None:
        self.deferring = False
        self._waiting: list[Callable[[], None]] = []

    def add(self, accumulate: Callable[[], None]) -> None:
        """Call `accumulate`, which adds to gradients, now or later."""
        if self.deferring:
            self._waiting.append(accumulate)
        else:
            accumulate()

    def take(self) -> Callable[[], None]:
        """The second half of the backwards since the last call: adds what has been kept, in the order it came."""
        waiting, self._waiting = self._waiting, []

        @torch.no_grad()
        def second_half() -> None:
            for accumulate in waiting:
                accumulate()

        return second_half


def add_product(parameter: nn.Parameter, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add the matrix product a b to the parameter's gradient."""
    if parameter.grad is None:
        parameter.grad = a @ b
    elif parameter.grad.dtype == a.dtype:
        parameter.grad.addmm_(a, b)
    else:
        parameter.grad += a @ b


def add_gradient(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    """Add `gradient` to the parameter's."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def add_rows(parameter: nn.Parameter, accumulate: Callable[[torch.Tensor], Any]) -> None:
    """Call `accumulate` with the parameter's gradient, to which it adds; zeros if there was none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    accumulate(parameter.grad)


class _Linear(torch.autograd.Function):
    """`F.linear` whose backward adds to the gradients of weight and bias itself."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: nn.Parameter | None, queue: WeightGradients
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        # The parameters themselves, not the tensors that autograd saves for them: their `.grad` is what counts.
        ctx.weight, ctx.bias, ctx.queue = weight, bias, queue
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias

        def accumulate() -> None:
            rows = gradient.reshape(-1, gradient.shape[-1])
            if weight.requires_grad:
                add_product(weight, rows.t(), x.reshape(-1, x.shape[-1]))
            if bias is not None and bias.requires_grad:
                add_gradient(bias, rows.sum(0))

        ctx.queue.add(accumulate)
        return (gradient @ weight if ctx.needs_input_grad[0] else None), None, None, None


class _Embedding(torch.autograd.Function):
    """`F.embedding` whose backward adds the rows it looked up to the gradient of the weight itself."""

    @staticmethod
    def forward(ctx: Any, index: torch.Tensor, weight: nn.Parameter, queue: WeightGradients) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.weight, ctx.queue = weight, queue
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        (index,) = ctx.saved_tensors
        weight = ctx.weight

        def accumulate() -> None:
            rows = gradient.reshape(-1, gradient.shape[-1])
            add_rows(weight, lambda total: total.index_add_(0, index.reshape(-1), rows.to(total.dtype)))

        if weight.requires_grad:
            ctx.queue.add(accumulate)
        return None, None, None


def _linear(queue: WeightGradients, self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = _Linear.apply(x, self.weight, self.bias, queue)  # type: ignore[no-untyped-call]
    return y


def _embedding(queue: WeightGradients, self: nn.Embedding, index: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = _Embedding.apply(index, self.weight, queue)  # type: ignore[no-untyped-call]
    return y


def accumulate_in_place(module: nn.Module, queue: WeightGradients | None = None) -> nn.Module:
    """Let every plain `nn.Linear` and `nn.Embedding` inside `module` add to its gradients in place; returns `module`.

    With a `queue` their weight gradients can be deferred. Subclasses, and embeddings with padding, norm limits or
    sparse gradients, are left as they are: autograd computes their weight gradients with those of their inputs.
    A module with an attribute `weight_gradients` of its own gets the queue, to defer what it likes.
    """
    queue = queue or WeightGradients()
    for part in module.modules():
        if type(part) is nn.Linear:
            part.forward = partial(_linear, queue, part)  # type: ignore[method-assign]
        elif type(part) is nn.Embedding and not (
            part.sparse or part.scale_grad_by_freq or part.padding_idx is not None or part.max_norm is not None
        ):
            part.forward = partial(_embedding, queue, part)  # type: ignore[method-assign]
        elif hasattr(part, "weight_gradients"):
            part.weight_gradients = queue  # type: ignore[assignment]
    return module
