"""The kinds of `nn.LayerNorm` and `nn.RMSNorm`."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar

from torch import nn

from axonn import tensor
from axonn.autoparallel.layer_kinds.base import Features, LayerKind, M, Place, Shapes, mixing
from axonn.autoparallel.layouts.op_rules import Label
from axonn.perf.layers.layer_cost import LayerCost, NormCost


class _LastDims(LayerKind[M]):
    """Kind of norms over the last dims, of which the very last can be cut."""

    normalises = True
    segmented = False
    centred: ClassVar[bool] = True
    """True if the mean is subtracted."""

    def features(self, module: M, shapes: Shapes) -> Features:
        last, size = len(shapes.input) - 1, shapes.input[-1]
        return Features(last, size, last, size, ("normalized_shape", "normalized_shape"))

    def labels(self, module: M, dims: int) -> tuple[list[Label], list[Label]]:
        return mixing(dims, len(module.normalized_shape))  # type: ignore[arg-type]

    def cost(self, module: M, shapes: Shapes, *, rows: int, axes: Any, segments: Any, gradient: bool) -> LayerCost:
        features = prod(module.normalized_shape)  # type: ignore[arg-type]
        return NormCost(
            positions=prod(shapes.output) // features // rows,
            features=features,
            axis=axes[1],
            centred=self.centred,
            weight=module.weight is not None,
            bias=getattr(module, "bias", None) is not None,
        )


class LayerNormKind(_LastDims[nn.LayerNorm]):
    """Kind of `nn.LayerNorm`: weight and bias [normalized_shape]."""

    def build(self, module: nn.LayerNorm, place: Place, like: dict[str, Any]) -> nn.Module:
        return tensor.LayerNorm(
            module.normalized_shape,
            module.eps,
            module.elementwise_affine,
            module.bias is not None,
            **like,
            context=place.context,
            axis=place.layout.input,
        )


class RMSNormKind(_LastDims[nn.RMSNorm]):
    """Kind of `nn.RMSNorm`: weight [normalized_shape]."""

    centred = False

    def build(self, module: nn.RMSNorm, place: Place, like: dict[str, Any]) -> nn.Module:
        return tensor.RMSNorm(
            module.normalized_shape,
            module.eps,
            module.elementwise_affine,
            **like,
            context=place.context,
            axis=place.layout.input,
        )
