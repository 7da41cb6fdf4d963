"""Vocabulary-parallel cross-entropy: the logits are never gathered."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from axonn.tensor.context import TensorAxis, TensorContext


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, context: TensorContext, axis: TensorAxis | None = "col"
) -> torch.Tensor:
    """Return the mean cross-entropy of `logits` [rows, vocabulary / G_axis] and `targets` [rows] (whole on every rank).

    Computed in float32 at least, since sums over the vocabulary need more digits than half precision has. As in Shoeybi
    et al., arXiv 1909.08053, the largest logit is all-reduced, then the sum of exponentials and the target's logit.
    """
    if context.extent(axis) == 1:
        return context.compiler.run(_uncut, logits, targets, like=logits)
    logits = _wide(logits)
    loss: torch.Tensor = _CrossEntropy.apply(logits, targets, context, axis)  # type: ignore[no-untyped-call]
    return loss


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _uncut(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # Compiled, it keeps only the half-precision logits, and passes over them once in each direction.
    return F.cross_entropy(_wide(logits), targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, context: TensorContext, axis: TensorAxis
    ) -> torch.Tensor:
        shifted = logits - context.all_reduce(logits.amax(-1), axis, "max").unsqueeze(-1)
        local_targets = targets - context.index(axis) * logits.shape[-1]
        missing = (local_targets < 0) | (local_targets >= logits.shape[-1])
        local_targets = local_targets.masked_fill_(missing, 0).unsqueeze(-1)
        target_logit = shifted.gather(-1, local_targets).squeeze(-1).masked_fill_(missing, 0)
        exponentials = shifted.exp_()
        total, target_logit = context.all_reduce(torch.stack([exponentials.sum(-1), target_logit]), axis)
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), local_targets, missing)
        mean: torch.Tensor = (total.log() - target_logit).mean()
        return mean

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        softmax, local_targets, missing = ctx.saved_tensors
        target_term = (missing.unsqueeze(-1).to(softmax.dtype)) - 1
        grad_logits = softmax.scatter_add(-1, local_targets, target_term)
        return grad_logits.mul_(grad_output / softmax.shape[0]), None, None, None
