"""In-place gradient accumulation (`axonn.tensor.gradient_accumulation`) for the layers of an ordinary module."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from axonn.tensor.context import TensorContext
from axonn.tensor.gradient_accumulation import WeightGradients
from axonn.tensor.layers.embedding import embedding
from axonn.tensor.layers.layer import Layout
from axonn.tensor.layers.linear import linear

_NOT_CUT = Layout(None, None)


def _linear(queue: WeightGradients, context: TensorContext, self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, self.weight, self.bias, context=context, layout=_NOT_CUT, weight_gradients=queue)


def _embedding(queue: WeightGradients, context: TensorContext, self: nn.Embedding, index: torch.Tensor) -> torch.Tensor:
    return embedding(index, self.weight, context=context, layout=_NOT_CUT, weight_gradients=queue)


def accumulate_in_place(module: nn.Module, queue: WeightGradients | None = None) -> nn.Module:
    """Make every plain `nn.Linear` and `nn.Embedding` in `module` accumulate its gradients in place; return `module`.

    With a `queue` their weight gradients can be deferred. Subclasses, and embeddings with padding, norm limits or
    sparse gradients, are left alone: autograd computes their weight gradients together with their input gradients.
    Modules with an attribute `weight_gradients` (tensor-parallel layers) get the queue.
    """
    queue = queue or WeightGradients()
    context = TensorContext.serial()
    for submodule in module.modules():
        if type(submodule) is nn.Linear:
            submodule.forward = partial(_linear, queue, context, submodule)  # type: ignore[method-assign]
        elif type(submodule) is nn.Embedding and not (
            submodule.sparse
            or submodule.scale_grad_by_freq
            or submodule.padding_idx is not None
            or submodule.max_norm is not None
        ):
            submodule.forward = partial(_embedding, queue, context, submodule)  # type: ignore[method-assign]
        elif hasattr(submodule, "weight_gradients"):
            submodule.weight_gradients = queue  # type: ignore[assignment]
    return module
