"""The two-dimensional embedding: vocabulary along one axis, features along the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from axonn.accumulation import add_rows
from axonn.tensor.context import TensorContext
from axonn.tensor.layer import TRANSPOSED, Layout, TensorLayer, check_layout, cut, segments_of


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
        self.first = context.index(layout.input) * self.weight.shape[0]
        """Index of the first embedding of this rank."""

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        if self.weight_gradients is None and self.context.grid.tensor == 1:
            return F.embedding(index, self.weight, self.padding_idx)
        y: torch.Tensor = _Embedding.apply(index, self.weight, self)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, layout={tuple(self.layout)}"


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: torch.Tensor, weight: torch.Tensor, layer: Embedding) -> torch.Tensor:
        ctx.layer = layer
        if layer.context.extent(layer.layout.input) == 1:
            ctx.save_for_backward(index, None)
            return F.embedding(index, weight)
        here = index - layer.first
        missing = (here < 0) | (here >= weight.shape[0])
        here = here.masked_fill_(missing, 0)
        ctx.save_for_backward(here, missing)
        y = F.embedding(here, weight).masked_fill_(missing.unsqueeze(-1), 0)
        return layer.context.all_reduce(y, layer.layout.input)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor | None, None]:
        here, missing = ctx.saved_tensors
        layer = ctx.layer
        if not ctx.needs_input_grad[1]:
            return None, None, None

        def accumulate(weight_gradient: torch.Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1])
            unused = missing
            if layer.padding_idx is not None:
                padding = here == layer.padding_idx - layer.first
                unused = padding if unused is None else unused | padding
            if unused is not None:
                rows = rows.masked_fill(unused.reshape(-1, 1), 0)
            weight_gradient.index_add_(0, here.reshape(-1), rows.to(weight_gradient.dtype))

        queue = layer.weight_gradients
        if queue is not None:
            queue.add(lambda: add_rows(layer.weight, accumulate))
            return None, None, None
        of_weight = torch.zeros_like(layer.weight)
        accumulate(of_weight)
        return None, of_weight, None
