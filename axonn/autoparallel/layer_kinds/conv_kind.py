"""The kind of `nn.Conv2d`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import nn

from axonn import tensor
from axonn.autoparallel.layer_kinds.base import Features, LayerKind, Place, Shapes, mixing
from axonn.autoparallel.layouts.op_rules import Label
from axonn.perf.layers.layer_cost import LayerCost, LinearCost


class Conv2dKind(LayerKind[nn.Conv2d]):
    """Kind of `nn.Conv2d`: activations [..., channels, height, width], weight [out, in, height, width]."""

    def refusal(self, module: nn.Conv2d) -> str:
        return f"grouped convolution (groups = {module.groups})" if module.groups != 1 else ""

    def features(self, module: nn.Conv2d, shapes: Shapes) -> Features:
        before, after = len(shapes.input), len(shapes.output)
        return Features(before - 3, module.in_channels, after - 3, module.out_channels, ("in_channels", "out_channels"))

    def labels(self, module: nn.Conv2d, dims: int) -> tuple[list[Label], list[Label]]:
        return mixing(dims, 3)

    def build(self, module: nn.Conv2d, place: Place, like: dict[str, Any]) -> nn.Module:
        return tensor.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            1,
            module.bias is not None,
            module.padding_mode,
            **like,
            context=place.context,
            layout=place.layout,
            in_segments=place.segments[0],
            out_segments=place.segments[1],
        )

    def cost(
        self, module: nn.Conv2d, shapes: Shapes, *, rows: int, axes: Any, segments: Any, gradient: bool
    ) -> LayerCost:
        return LinearCost(
            positions=prod(shapes.output[-2:]),
            inputs=module.in_channels,
            outputs=module.out_channels,
            layout=axes,
            bias=module.bias is not None,
            input_gradient=gradient,
            kernel=module.kernel_size[0] * module.kernel_size[1],
            input_positions=_pixels_read(module, shapes.input[-2:]),
        )


def _pixels_read(module: nn.Conv2d, size: Sequence[int]) -> int:
    """Return the pixels that the convolution itself reads, which include padding that is not zeros or not symmetric."""
    left, right, top, bottom = module._reversed_padding_repeated_twice
    if module.padding_mode == "zeros" and left == right and top == bottom:
        return prod(size)
    return (size[0] + top + bottom) * (size[1] + left + right)
