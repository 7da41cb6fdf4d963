"""The two-dimensional embedding: vocabulary along one axis, features along the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from axonn.tensor.context import TensorContext
from axonn.tensor.gradient_accumulation import WeightGradients, add_rows
from axonn.tensor.layers.layer import TRANSPOSED, Layout, TensorLayer, check_layout, cut, segments_of


class Embedding(TensorLayer):
    """`nn.Embedding` with its weight [V, H] cut in both dims: indices [...], whole on every rank -> [..., H / G_out].

    A rank looks up what lies in its part of the vocabulary; the sum along that axis (the input's of `layout`) completes
    it. With `padding_idx` the row gets no gradient. Raises `GridError` when vocabulary or features cannot be cut so.
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
        what = f"Embedding({num_embeddings}, {embedding_dim})"
        check_layout(layout, what)
        rows = segments_of(num_embeddings, None, context, layout.input, f"num_embeddings of {what}")
        features = segments_of(embedding_dim, None, context, layout.output, f"embedding_dim of {what}")
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
    """What `Embedding` computes, with this part of the weight: [...] -> [..., H / G_out].

    With `weight_gradients`, `weight` is a parameter, to whose gradient is added there.
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
        # The parameter itself, not the tensor that autograd saves for it: its `.grad` is what counts.
        ctx.weight, ctx.queue = weight, queue
        first = context.index(layout.input) * weight.shape[0]
        ctx.padding = None if padding_idx is None else padding_idx - first
        if context.extent(layout.input) == 1:
            ctx.save_for_backward(index, None)
            return F.embedding(index, weight)
        here = index - first
        missing = (here < 0) | (here >= weight.shape[0])
        here = here.masked_fill_(missing, 0)
        ctx.save_for_backward(here, missing)
        y = F.embedding(here, weight).masked_fill_(missing.unsqueeze(-1), 0)
        return context.all_reduce(y, layout.input)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        here, missing = ctx.saved_tensors
        weight, padding = ctx.weight, ctx.padding
        of_weight = None

        def accumulate(weight_gradient: torch.Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1])
            unused = missing
            if padding is not None:
                unused = here == padding if unused is None else unused | (here == padding)
            if unused is not None:
                rows = rows.masked_fill(unused.reshape(-1, 1), 0)
            if weight_gradient.is_cpu:
                weight_gradient.index_add_(0, here.reshape(-1), rows.to(weight_gradient.dtype))
                return
            # A GPU would add the rows of a token one by one, each sum rounded to the gradient's type. This adds them
            # up in float32, in an order of their own.
            sums = torch.ops.aten.embedding_dense_backward(rows, here.reshape(-1), len(weight_gradient), -1, False)
            weight_gradient.add_(sums)

        if ctx.needs_input_grad[1] and ctx.queue is not None:
            ctx.queue.add(lambda: add_rows(weight, accumulate))
        elif ctx.needs_input_grad[1]:
            of_weight = torch.zeros_like(weight)
            accumulate(of_weight)
        return None, of_weight, None, None, None, None
