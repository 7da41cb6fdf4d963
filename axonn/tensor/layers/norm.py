"""Tensor-parallel norms over cut features: they all-reduce their moments, and so equal the serial norms."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from axonn.tensor.autocast import norm_input
from axonn.tensor.context import TensorAxis, TensorContext
from axonn.tensor.layers.layer import TensorLayer, cut, segments_of


class _FeatureNorm(TensorLayer):
    """A norm over the last dims, `normalized_shape`, the very last of which is cut along `axis`."""

    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        parameters: dict[str, bool],
        device: torch.device | None,
        dtype: torch.dtype | None,
        context: TensorContext,
        axis: TensorAxis | None,
    ) -> None:
        super().__init__(context)
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if not shape:
            raise ValueError(f"normalized_shape of {type(self).__name__} is empty; name the sizes of the last dims")
        self.normalized_shape = shape
        self.features = prod(shape)
        """Number of values that are normalised together, over all ranks."""
        self.eps = eps
        self.axis: TensorAxis | None = axis
        label = f"normalized_shape of {type(self).__name__}({normalized_shape})"
        feature_cut = cut(len(shape) - 1, axis, segments_of(shape[-1], None, context, axis, label))
        for name, present in parameters.items():
            if present:
                self.place(name, shape, feature_cut, device=device, dtype=dtype)
            else:
                self.register_parameter(name, None)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, axis={self.axis}"


class LayerNorm(_FeatureNorm):
    """`nn.LayerNorm` whose last dim is cut along `axis`: [..., features / G_axis] -> the same.

    Raises `GridError` when the last dim cannot be cut so.
    """

    eps: float

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        context: TensorContext,
        axis: TensorAxis | None = "row",
    ) -> None:
        parameters = {"weight": elementwise_affine, "bias": elementwise_affine and bias}
        super().__init__(normalized_shape, eps, parameters, device, dtype, context, axis)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.context.extent(self.axis) == 1:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        flat = norm_input(x).flatten(-len(self.normalized_shape))
        y: torch.Tensor = _LayerNorm.apply(flat, weight, bias, self)  # type: ignore[no-untyped-call]
        return y.view(x.shape)


class RMSNorm(_FeatureNorm):
    """`nn.RMSNorm` whose last dim is cut along `axis`: [..., features / G_axis] -> the same.

    `eps` of None is the machine epsilon of the type of the computation, float32 for half types. Raises `GridError` when
    the last dim cannot be cut so.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        context: TensorContext,
        axis: TensorAxis | None = "row",
    ) -> None:
        super().__init__(normalized_shape, eps, {"weight": elementwise_affine}, device, dtype, context, axis)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.context.extent(self.axis) == 1:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        weight = None if self.weight is None else self.weight.flatten()
        flat = norm_input(x).flatten(-len(self.normalized_shape))
        y: torch.Tensor = _RMSNorm.apply(flat, weight, self)  # type: ignore[no-untyped-call]
        return y.view(x.shape)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which moments of values of `dtype` are computed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def mean_and_variance(
    mean: torch.Tensor, squares: torch.Tensor, shares: torch.Tensor, context: TensorContext, axis: TensorAxis | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of values that are spread over the ranks along `axis`.

    `mean`: mean of this rank's values; `squares`: their mean squared difference from it, of the same shape. `shares`
    [ranks, ...], broadcast against [ranks, *shape]: the share of all values that each rank has. (Chan, Golub & LeVeque,
    1979, without cancellation.)
    """
    means, squares = context.all_gather(torch.stack([mean, squares]), axis).unbind(1)
    total_mean = (shares * means).sum(0)
    return total_mean, (shares * (squares + (means - total_mean).square())).sum(0)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, layer: LayerNorm
    ) -> torch.Tensor:
        local = x.to(wide_type(x.dtype))
        mean = local.mean(-1)
        squares = (local - mean.unsqueeze(-1)).square().mean(-1)
        ranks = layer.context.extent(layer.axis)
        share = mean.new_full([ranks, *[1] * mean.dim()], 1 / ranks)
        mean, variance = mean_and_variance(mean, squares, share, layer.context, layer.axis)
        scale = (variance + layer.eps).rsqrt().unsqueeze(-1)
        normal = (local - mean.unsqueeze(-1)).mul_(scale).to(x.dtype)
        ctx.save_for_backward(normal, scale, weight)
        ctx.layer = layer
        y = normal if weight is None else normal * weight
        return (y if bias is None else y + bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normal, scale, weight = ctx.saved_tensors
        layer = ctx.layer
        grad_normal = (grad_output if weight is None else grad_output * weight).to(scale.dtype)
        wide = normal.to(scale.dtype)
        sums = torch.stack([grad_normal.sum(-1), (grad_normal * wide).sum(-1)])
        reduction = layer.context.start_all_reduce(sums, layer.axis)
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_weight = (rows * normal.reshape(rows.shape)).sum(0) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        reduction.wait()
        first, second = (sums / layer.features).unsqueeze(-1).unbind(0)
        grad_input = (grad_normal - first - wide * second).mul_(scale).to(grad_output.dtype)
        return grad_input, grad_weight, grad_bias, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, layer: RMSNorm) -> torch.Tensor:
        local = x.to(wide_type(x.dtype))
        squares = layer.context.all_reduce(local.square().sum(-1), layer.axis)
        eps = torch.finfo(local.dtype).eps if layer.eps is None else layer.eps
        scale = (squares / layer.features + eps).rsqrt().unsqueeze(-1)
        normal = (local * scale).to(x.dtype)
        ctx.save_for_backward(normal, scale, weight)
        ctx.layer = layer
        return (normal if weight is None else normal * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normal, scale, weight = ctx.saved_tensors
        layer = ctx.layer
        grad_normal = (grad_output if weight is None else grad_output * weight).to(scale.dtype)
        wide = normal.to(scale.dtype)
        product = (grad_normal * wide).sum(-1)
        reduction = layer.context.start_all_reduce(product, layer.axis)
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_weight = (rows * normal.reshape(rows.shape)).sum(0) if ctx.needs_input_grad[1] else None
        reduction.wait()
        grad_input = (grad_normal - wide * (product / layer.features).unsqueeze(-1)).mul_(scale).to(grad_output.dtype)
        return grad_input, grad_weight, None
