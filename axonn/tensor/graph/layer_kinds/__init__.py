"""Which modules of torch become tensor-parallel layers: `KINDS`."""

from __future__ import annotations

from typing import Any

from torch import nn

from axonn.tensor.graph.layer_kinds.base import Features, LayerKind, Place, Shapes
from axonn.tensor.graph.layer_kinds.conv import Conv2dKind
from axonn.tensor.graph.layer_kinds.embedding import EmbeddingKind
from axonn.tensor.graph.layer_kinds.group_norm import GroupNormKind
from axonn.tensor.graph.layer_kinds.linear import LinearKind
from axonn.tensor.graph.layer_kinds.norms import LayerNormKind, RMSNormKind

__all__ = ["KINDS", "Features", "LayerKind", "Place", "Shapes"]

KINDS: dict[type[nn.Module], LayerKind[Any]] = {
    nn.Linear: LinearKind(),
    nn.Conv2d: Conv2dKind(),
    nn.Embedding: EmbeddingKind(),
    nn.LayerNorm: LayerNormKind(),
    nn.RMSNorm: RMSNormKind(),
    nn.GroupNorm: GroupNormKind(),
}
"""By the class itself: a class derived of one of these may compute something else."""
