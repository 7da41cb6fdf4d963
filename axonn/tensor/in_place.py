"""Lets the layers of a module accumulate their weight gradients where they lie (`axonn.tensor.gradient_accumulation`)."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from axonn.tensor.context import TensorContext
from axonn.tensor.gradient_accumulation import WeightGradients
from axonn.tensor.layers.embedding import embedding
from axonn.tensor.layers.layer import Layout
from axonn.tensor.layers.linear import linear

_WHOLE = Layout(None, None)


def _linear(queue: WeightGradients, context: TensorContext, self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, self.weight, self.bias, context=context, layout=_WHOLE, weight_gradients=queue)


def _embedding(queue: WeightGradients, context: TensorContext, self: nn.Embedding, index: torch.Tensor) -> torch.Tensor:
    return embedding(index, self.weight, context=context, layout=_WHOLE, weight_gradients=queue)


def accumulate_in_place(module: nn.Module, queue: WeightGradients | None = None) -> nn.Module:
    """Let every plain `nn.Linear` and `nn.Embedding` inside `module` add to its gradients in place; returns `module`.

    With a `queue` their weight gradients can be deferred. Subclasses, and embeddings with padding, norm limits or
    sparse gradients, are left as they are: autograd computes their weight gradients with those of their inputs.
    A module with an attribute `weight_gradients` of its own gets the queue, to defer what it likes.
    """
    queue = queue or WeightGradients()
    context = TensorContext.serial()
    for part in module.modules():
        if type(part) is nn.Linear:
            part.forward = partial(_linear, queue, context, part)  # type: ignore[method-assign]
        elif type(part) is nn.Embedding and not (
            part.sparse or part.scale_grad_by_freq or part.padding_idx is not None or part.max_norm is not None
        ):
            part.forward = partial(_embedding, queue, context, part)  # type: ignore[method-assign]
        elif hasattr(part, "weight_gradients"):
            part.weight_gradients = queue  # type: ignore[assignment]
    return module
