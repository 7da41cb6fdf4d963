"""Cross-entropy over a vocabulary that is cut: the logits are never gathered."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from axonn.tensor.context import TensorAxis, TensorContext


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, context: TensorContext, axis: TensorAxis | None = "col"
) -> torch.Tensor:
    """Mean cross-entropy, a scalar, of `logits` [rows, vocabulary / G_axis] and `targets` [rows] (whole on every rank).

    In float32 at least, since sums over the vocabulary need more digits than half precision has. As in Shoeybi et al.,
    arXiv 1909.08053: the largest logit, then the sum of exponentials and the target's logit are reduced.
    """
    if context.extent(axis) == 1:
        return context.compiler.run(_whole, logits, targets, like=logits)
    logits = _wide(logits)
    loss: torch.Tensor = _CrossEntropy.apply(logits, targets, context, axis)  # type: ignore[no-untyped-call]
    return loss


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _whole(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # Compiled, it keeps the logits of half precision alone, and passes over them once each way.
    return F.cross_entropy(_wide(logits), targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, context: TensorContext, axis: TensorAxis
    ) -> torch.Tensor:
        shifted = logits - context.all_reduce(logits.amax(-1), axis, "max").unsqueeze(-1)
        here = targets - context.index(axis) * logits.shape[-1]
        missing = (here < 0) | (here >= logits.shape[-1])
        here = here.masked_fill_(missing, 0).unsqueeze(-1)
        of_target = shifted.gather(-1, here).squeeze(-1).masked_fill_(missing, 0)
        exponentials = shifted.exp_()
        total, of_target = context.all_reduce(torch.stack([exponentials.sum(-1), of_target]), axis)
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), here, missing)
        mean: torch.Tensor = (total.log() - of_target).mean()
        return mean

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        softmax, here, missing = ctx.saved_tensors
        of_target = (missing.unsqueeze(-1).to(softmax.dtype)) - 1
        of_logits = softmax.scatter_add(-1, here, of_target)
        return of_logits.mul_(gradient / softmax.shape[0]), None, None, None
