"""Tensor-parallel `nn.Embedding`: vocabulary along one axis, features along the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from axonn.tensor.context import TensorContext
from axonn.tensor.gradient_accumulation import WeightGradients, add_rows
from axonn.tensor.layers.layer import TRANSPOSED, Layout, TensorLayer, check_layout, cut, segments_of


class Embedding(TensorLayer):
    """`nn.Embedding` with its weight [V, H] cut in both dims: indices [...], whole on every rank -> [..., H / G_out].

    Each rank looks up the indices in its part of the vocabulary; an all-reduce along that axis (the input's of
    `layout`) completes the output. The row of `padding_idx` gets no gradient. Raises `GridError` when vocabulary or
    features cannot be cut so.
    """

    weight: torch.nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        context: TensorContext,
        layout: Layout = TRANSPOSED,
    ) -> None:
        super().__init__(context)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx {padding_idx} is not one of {num_embeddings} embeddings")
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.layout = layout
        label = f"Embedding({num_embeddings}, {embedding_dim})"
        check_layout(layout, label)
        rows = segments_of(num_embeddings, None, context, layout.input, f"num_embeddings of {label}")
        features = segments_of(embedding_dim, None, context, layout.output, f"embedding_dim of {label}")
        cuts = cut(0, layout.input, rows), cut(1, layout.output, features)
        self.place("weight", (num_embeddings, embedding_dim), *cuts, device=device, dtype=dtype)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return embedding(
            index,
            self.weight,
            context=self.context,
            layout=self.layout,
            padding_idx=self.padding_idx,
            weight_gradients=self.weight_gradients,
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, layout={tuple(self.layout)}"


def embedding(
    index: torch.Tensor,
    weight: torch.Tensor,
    *,
    context: TensorContext,
    layout: Layout,
    padding_idx: int | None = None,
    weight_gradients: WeightGradients | None = None,
) -> torch.Tensor:
    """Compute what `Embedding` does, with this rank's part of the weight: [...] -> [..., H / G_out].

    With `weight_gradients`, `weight` is a parameter whose gradient is accumulated there.
    """
    if weight_gradients is None and context.grid.tensor == 1:
        return F.embedding(index, weight, padding_idx)
    y: torch.Tensor = _Embedding.apply(  # type: ignore[no-untyped-call]
        index, weight, context, layout, padding_idx, weight_gradients
    )
    return y


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        index: torch.Tensor,
        weight: torch.Tensor,
        context: TensorContext,
        layout: Layout,
        padding_idx: int | None,
        queue: WeightGradients | None,
    ) -> torch.Tensor:
        # `accumulate` adds to the `.grad` of the parameter itself, not of the tensor that autograd saves.
        ctx.weight, ctx.queue = weight, queue
        first = context.index(layout.input) * weight.shape[0]
        ctx.padding = None if padding_idx is None else padding_idx - first
        if context.extent(layout.input) == 1:
            ctx.save_for_backward(index, None)
            return F.embedding(index, weight)
        local_index = index - first
        missing = (local_index < 0) | (local_index >= weight.shape[0])
        local_index = local_index.masked_fill_(missing, 0)
        ctx.save_for_backward(local_index, missing)
        y = F.embedding(local_index, weight).masked_fill_(missing.unsqueeze(-1), 0)
        return context.all_reduce(y, layout.input)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        local_index, missing = ctx.saved_tensors
        weight, padding = ctx.weight, ctx.padding
        grad_weight = None

        def accumulate(total: torch.Tensor) -> None:
            rows = grad_output.reshape(-1, grad_output.shape[-1])
            unused = missing
            if padding is not None:
                unused = local_index == padding if unused is None else unused | (local_index == padding)
            if unused is not None:
                rows = rows.masked_fill(unused.reshape(-1, 1), 0)
            if total.is_cpu:
                total.index_add_(0, local_index.reshape(-1), rows.to(total.dtype))
                return
            # On a GPU, index_add_ would round to the gradient's type after each row of a token. This function adds the
            # rows up in float32, in an order of its own.
            sums = torch.ops.aten.embedding_dense_backward(rows, local_index.reshape(-1), len(total), -1, False)
            total.add_(sums)

        if ctx.needs_input_grad[1] and ctx.queue is not None:
            ctx.queue.add(lambda: add_rows(weight, accumulate))
        elif ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            accumulate(grad_weight)
        return None, grad_weight, None, None, None, None
