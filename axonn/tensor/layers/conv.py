"""Tensor-parallel `nn.Conv2d`: its channels are cut along row and col like the features of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from axonn.errors import GridError
from axonn.tensor.autocast import product_inputs, without_autocast
from axonn.tensor.context import TensorContext
from axonn.tensor.gradient_accumulation import add_gradient
from axonn.tensor.layers.layer import NORMAL, Layout, TensorLayer, check_layout, cut, segments_of

Pair = tuple[int, int]
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class Conv2d(TensorLayer):
    """`nn.Conv2d` with its weight [out, in, height, width] cut in both channel dims.

    [batch, in / G_in, height, width] -> [batch, out / G_out, height', width'], also without the batch dim. Each rank
    convolves its part. The output is all-reduced along the axis of the input; the input gradient is all-reduced along
    the axis of the output while the weight gradient, which needs no reduction, is computed. The bias is cut like the
    output and added after the reduction. Channels that are not cut (those of an image) have None in `layout`.

    `in_segments`, `out_segments`: segments of the channels that are each cut by themselves. `groups` other than 1 work
    only where no channels are cut: a group connects few channels, so most ranks would have nothing to compute. Raises
    `GridError` when the channels cannot be cut so.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        context: TensorContext,
        layout: Layout = NORMAL,
        in_segments: Sequence[int] | None = None,
        out_segments: Sequence[int] | None = None,
    ) -> None:
        super().__init__(context)
        label = f"Conv2d({in_channels}, {out_channels}, {kernel_size})"
        check_layout(layout, label)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.layout = layout
        rows = segments_of(in_channels, in_segments, context, layout.input, f"in_channels of {label}")
        columns = segments_of(out_channels, out_segments, context, layout.output, f"out_channels of {label}")
        self._check_groups(groups, label)
        self.groups = groups
        self._set_padding(padding, padding_mode, _pair(stride), _pair(dilation), label)
        out = cut(0, layout.output, columns)
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.place("weight", shape, out, cut(1, layout.input, rows), device=device, dtype=dtype)
        if bias:
            self.place("bias", (out_channels,), out, device=device, dtype=dtype)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._pad is not None:
            x = F.pad(x, self._pad, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        geometry = self._geometry
        if self.weight_gradients is None and self.context.grid.tensor == 1:
            return F.conv2d(
                x, self.weight, self.bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
            )
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        operands: tuple[torch.Tensor | None, ...] = batch, self.weight, self.bias
        if self.weight_gradients is None:  # Gradients accumulated in place are computed in the parameters' own type.
            operands = product_inputs(*operands)
        with without_autocast(x):
            y: torch.Tensor = _Conv2d.apply(*operands, self, geometry)  # type: ignore[no-untyped-call]
        return y if x.dim() == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"padding_mode={self.padding_mode}, layout={tuple(self.layout)}"
        )

    def _check_groups(self, groups: int, label: str) -> None:
        if groups < 1 or self.in_channels % groups or self.out_channels % groups:
            raise ValueError(f"groups ({groups}) of {label} must be a divisor of in_channels and of out_channels")
        for axis in self.layout:
            if groups > 1 and self.context.extent(axis) > 1:
                raise GridError(
                    f"{label} with groups = {groups} cannot be cut along {axis} = {self.context.extent(axis)}: "
                    "most ranks would hold no weights that connect channels; "
                    f"set groups=1, G_{axis} = 1 or layout=Layout(None, None)"
                )

    def _set_padding(
        self, padding: int | Pair | str, padding_mode: str, stride: Pair, dilation: Pair, label: str
    ) -> None:
        """Set the geometry and what `F.pad` has to pad: the convolution itself only pads zeros, symmetrically."""
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode {padding_mode!r} of {label} is none of {', '.join(_PADDING_MODES)}")
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"padding {padding!r} of {label} is neither a number nor 'same' or 'valid'")
        if padding == "same" and stride != (1, 1):
            raise ValueError(f"padding 'same' of {label} needs stride 1, not {stride}: the output would be smaller")
        self.stride, self.padding, self.dilation, self.padding_mode = stride, padding, dilation, padding_mode
        if isinstance(padding, str):
            missing = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, self.kernel_size, strict=True)]
            before = missing[0] // 2, missing[1] // 2
            after = missing[0] - before[0], missing[1] - before[1]
        else:
            before = after = _pair(padding)
        inside = padding_mode == "zeros" and before == after
        self._geometry = _Geometry(stride, before if inside else (0, 0), dilation, self.groups)
        # As F.pad wants it, the last dim first.
        self._pad = None if inside else [before[1], after[1], before[0], after[0]]


class _Geometry(NamedTuple):
    """Geometry of a convolution, in the order of the arguments of torch's functions."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: Conv2d, geometry: _Geometry
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        # `accumulate` adds to the `.grad` of the layer's own parameters, not of the tensors that autograd saves.
        ctx.layer, ctx.geometry = layer, geometry
        context, axis = layer.context, layer.layout.input
        if context.extent(axis) == 1:
            return F.conv2d(x, weight, bias, *geometry)
        y = context.all_reduce(_dense(F.conv2d(x, weight, None, *geometry)), axis)
        return y if bias is None else y.add_(bias.view(-1, 1, 1))

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer, geometry = ctx.layer, ctx.geometry
        needs_input, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        reduction = grad_input = grad_weight = grad_bias = None
        if needs_input:
            grad_input = _dense(_gradient(grad_output, x, weight, geometry, wrt_input=True))
            reduction = layer.context.start_all_reduce(grad_input, layer.layout.output)

        def weight_gradient() -> torch.Tensor:
            return _gradient(grad_output, x, weight, geometry, wrt_input=False)

        def accumulate() -> None:
            if needs_weight:
                add_gradient(layer.weight, weight_gradient())
            if needs_bias:
                add_gradient(layer.bias, grad_output.sum((0, 2, 3)))

        queue = layer.weight_gradients
        if queue is not None:
            queue.add(accumulate)
        else:
            grad_weight = weight_gradient() if needs_weight else None
            grad_bias = grad_output.sum((0, 2, 3)) if needs_bias else None
        if reduction is not None:
            reduction.wait()
        return grad_input, grad_weight, grad_bias, None, None


def _gradient(
    grad_output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: _Geometry, *, wrt_input: bool
) -> torch.Tensor:
    """Return the gradient with respect to the input (`wrt_input`), or else to the weight."""
    grad: torch.Tensor = torch.ops.aten.convolution_backward(
        grad_output,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0, 0),
        geometry.groups,
        (wrt_input, not wrt_input, False),
    )[0 if wrt_input else 1]
    return grad


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Convert images [batch, channels, height, width] on a GPU to the memory format that its convolutions compute in.

    Later operations keep it. Images on a CPU are returned as they are.
    """
    return x if x.is_cpu else x.contiguous(memory_format=torch.channels_last)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Make `x` dense in memory, in the same order on every rank, so that it can be reduced in place."""
    return x if not x.is_cpu and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
