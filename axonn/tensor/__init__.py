"""Tensor parallelism in two dimensions: layers whose weights are cut along row and col (DESIGN section 5)."""

from axonn.tensor.attention import MultiheadAttention, attention
from axonn.tensor.context import Position, Positions, TensorAxis, TensorContext
from axonn.tensor.conv import Conv2d
from axonn.tensor.dropout import Dropout
from axonn.tensor.embedding import Embedding
from axonn.tensor.fit import Requirement, check_fit
from axonn.tensor.group_norm import GroupNorm
from axonn.tensor.layer import NORMAL, TRANSPOSED, Layout, TensorLayer, placements
from axonn.tensor.linear import Linear
from axonn.tensor.loss import cross_entropy
from axonn.tensor.norm import LayerNorm, RMSNorm
from axonn.tensor.relayout import gather, relayout, split

__all__ = [
    "NORMAL",
    "TRANSPOSED",
    "Conv2d",
    "Dropout",
    "Embedding",
    "GroupNorm",
    "LayerNorm",
    "Layout",
    "Linear",
    "MultiheadAttention",
    "Position",
    "Positions",
    "RMSNorm",
    "Requirement",
    "TensorAxis",
    "TensorContext",
    "TensorLayer",
    "attention",
    "check_fit",
    "cross_entropy",
    "gather",
    "placements",
    "relayout",
    "split",
]
