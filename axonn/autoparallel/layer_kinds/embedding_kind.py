"""The kind of `nn.Embedding`."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn

from axonn import tensor
from axonn.autoparallel.layer_kinds.base import Features, LayerKind, Place, Shapes
from axonn.autoparallel.layouts.op_rules import Label
from axonn.perf.layers.layer_cost import EmbeddingCost, LayerCost


class EmbeddingKind(LayerKind[nn.Embedding]):
    """Kind of `nn.Embedding`: weight [num_embeddings, embedding_dim]. Its input axis cuts the vocabulary."""

    weight_dims = (1, 0)

    def refusal(self, module: nn.Embedding) -> str:
        options = [n for n in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(module, n)]
        return f"embedding with {' and '.join(options)}" if options else ""

    def features(self, module: nn.Embedding, shapes: Shapes) -> Features:
        names = "num_embeddings", "embedding_dim"
        return Features(None, module.num_embeddings, len(shapes.output) - 1, module.embedding_dim, names)

    def labels(self, module: nn.Embedding, dims: int) -> tuple[list[Label], list[Label]]:
        return list(range(dims)), [*range(dims), None]

    def build(self, module: nn.Embedding, place: Place, like: dict[str, Any]) -> nn.Module:
        return tensor.Embedding(
            module.num_embeddings,
            module.embedding_dim,
            module.padding_idx,
            **like,
            context=place.context,
            layout=place.layout,
        )

    def cost(
        self, module: nn.Embedding, shapes: Shapes, *, rows: int, axes: Any, segments: Any, gradient: bool
    ) -> LayerCost:
        return EmbeddingCost(
            positions=prod(shapes.output[:-1]) // rows,
            entries=module.num_embeddings,
            features=module.embedding_dim,
            layout=axes,
        )
