"""The kind of `nn.GroupNorm`."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn

from axonn import tensor
from axonn.autoparallel.layer_kinds.base import Features, LayerKind, Place, Shapes, mixing
from axonn.autoparallel.layouts.op_rules import Label
from axonn.perf.layers.layer_cost import GroupNormCost, LayerCost


class GroupNormKind(LayerKind[nn.GroupNorm]):
    """Kind of `nn.GroupNorm`: activations [rows, channels, ...], weight and bias [channels]."""

    normalises = True

    def features(self, module: nn.GroupNorm, shapes: Shapes) -> Features:
        return Features(1, module.num_channels, 1, module.num_channels, ("num_channels", "num_channels"))

    def labels(self, module: nn.GroupNorm, dims: int) -> tuple[list[Label], list[Label]]:
        return mixing(dims, dims - 1)

    def build(self, module: nn.GroupNorm, place: Place, like: dict[str, Any]) -> nn.Module:
        return tensor.GroupNorm(
            module.num_groups,
            module.num_channels,
            module.eps,
            module.affine,
            **like,
            context=place.context,
            axis=place.layout.input,
            segments=place.segments[0],
        )

    def cost(
        self, module: nn.GroupNorm, shapes: Shapes, *, rows: int, axes: Any, segments: Any, gradient: bool
    ) -> LayerCost:
        return GroupNormCost(
            groups=module.num_groups,
            segments=segments or (module.num_channels,),
            axis=axes[1],
            positions=prod(shapes.output[2:]),
            affine=module.affine,
        )
