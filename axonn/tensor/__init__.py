"""Two-dimensional tensor parallelism: layers whose weights are cut along row and col (docs/design.md, section 5)."""

from axonn.tensor.context import Position, Positions, TensorAxis, TensorContext
from axonn.tensor.divisibility import Requirement, check_fit
from axonn.tensor.layers.attention import MultiheadAttention, attention
from axonn.tensor.layers.conv import Conv2d
from axonn.tensor.layers.cross_entropy import cross_entropy
from axonn.tensor.layers.dropout import Dropout
from axonn.tensor.layers.embedding import Embedding
from axonn.tensor.layers.group_norm import GroupNorm
from axonn.tensor.layers.layer import NORMAL, TRANSPOSED, Layout, TensorLayer, placements
from axonn.tensor.layers.linear import Linear
from axonn.tensor.layers.norm import LayerNorm, RMSNorm
from axonn.tensor.redistribution import gather, redistribute, split

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
    "redistribute",
    "split",
]
