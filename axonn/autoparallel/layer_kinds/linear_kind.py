"""The kind of `nn.Linear`."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn

from axonn import tensor
from axonn.autoparallel.layer_kinds.base import Features, LayerKind, Place, Shapes, mixing
from axonn.autoparallel.layouts.op_rules import Label
from axonn.perf.layers.layer_cost import LayerCost, LinearCost


class LinearKind(LayerKind[nn.Linear]):
    """Kind of `nn.Linear`: activations [..., features], weight [out_features, in_features]."""

    def features(self, module: nn.Linear, shapes: Shapes) -> Features:
        before, after = len(shapes.input), len(shapes.output)
        return Features(before - 1, module.in_features, after - 1, module.out_features, ("in_features", "out_features"))

    def labels(self, module: nn.Linear, dims: int) -> tuple[list[Label], list[Label]]:
        return mixing(dims, 1)

    def build(self, module: nn.Linear, place: Place, like: dict[str, Any]) -> nn.Module:
        return tensor.Linear(
            module.in_features,
            module.out_features,
            module.bias is not None,
            **like,
            context=place.context,
            layout=place.layout,
            in_segments=place.segments[0],
            out_segments=place.segments[1],
        )

    def cost(
        self, module: nn.Linear, shapes: Shapes, *, rows: int, axes: Any, segments: Any, gradient: bool
    ) -> LayerCost:
        return LinearCost(
            positions=prod(shapes.output[:-1]) // rows,
            inputs=module.in_features,
            outputs=module.out_features,
            layout=axes,
            bias=module.bias is not None,
            input_gradient=gradient,
        )
