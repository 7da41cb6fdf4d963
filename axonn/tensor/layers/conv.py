"""The two-dimensional convolution: channels are its features, cut along row and col like those of a linear layer."""

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
    """`nn.Conv2d` with its weight [out, in, height, width] cut in both dims of channels:
    [batch, in / G_in, height, width] -> [batch, out / G_out, height', width'], or without the batch.

    Each rank convolves its part, the output is summed along the axis of the input, the input's gradient along that of
    the output, while the weight's gradient, which needs no sum, is computed. The bias lies as the output does and is
    added after the sum. Channels that are not cut (those of an image) have None in `layout`.

    `in_segments`, `out_segments`: parts of the channels that are each cut by themselves. `groups` other than 1 work
    where no channels are cut: a group connects few channels, and of most pairs of parts none at all, so most ranks
    would have nothing to compute. Raises `GridError` when the channels cannot be cut so.
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
        what = f"Conv2d({in_channels}, {out_channels}, {kernel_size})"
        check_layout(layout, what)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.layout = layout
        rows = segments_of(in_channels, in_segments, context, layout.input, f"in_channels of {what}")
        columns = segments_of(out_channels, out_segments, context, layout.output, f"out_channels of {what}")
        self._check_groups(groups, what)
        self.groups = groups
        self._set_padding(padding, padding_mode, _pair(stride), _pair(dilation), what)
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
        how = self._geometry
        if self.weight_gradients is None and self.context.grid.tensor == 1:
            return F.conv2d(x, self.weight, self.bias, how.stride, how.padding, how.dilation, how.groups)
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        given = batch, self.weight, self.bias
        # What is accumulated in place is computed in the parameters' own type.
        given = given if self.weight_gradients is not None else product_inputs(*given)  # type: ignore[assignment]
        with without_autocast(x):
            y: torch.Tensor = _Conv2d.apply(*given, self, how)  # type: ignore[no-untyped-call]
        return y if x.dim() == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"padding_mode={self.padding_mode}, layout={tuple(self.layout)}"
        )

    def _check_groups(self, groups: int, what: str) -> None:
        if groups < 1 or self.in_channels % groups or self.out_channels % groups:
            raise ValueError(f"groups ({groups}) of {what} must be a divisor of in_channels and of out_channels")
        for axis in self.layout:
            if groups > 1 and self.context.extent(axis) > 1:
                raise GridError(
                    f"{what} with groups = {groups} cannot be cut along {axis} = {self.context.extent(axis)}: "
                    "most ranks would hold no weights that connect channels; "
                    f"set groups=1, G_{axis} = 1 or layout=Layout(None, None)"
                )

    def _set_padding(
        self, padding: int | Pair | str, padding_mode: str, stride: Pair, dilation: Pair, what: str
    ) -> None:
        """What is padded beforehand, because the convolution itself only pads zeros, both sides alike, and the rest."""
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode {padding_mode!r} of {what} is none of {', '.join(_PADDING_MODES)}")
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"padding {padding!r} of {what} is neither a number nor 'same' or 'valid'")
        if padding == "same" and stride != (1, 1):
            raise ValueError(f"padding 'same' of {what} needs stride 1, not {stride}: the output would be smaller")
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
    """How the kernel goes over the image, in the order of torch's own functions."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: Conv2d, how: _Geometry
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        # The layer's own parameters, not the tensors that autograd saves for them: their `.grad` is what counts.
        ctx.layer, ctx.how = layer, how
        context, axis = layer.context, layer.layout.input
        if context.extent(axis) == 1:
            return F.conv2d(x, weight, bias, *how)
        y = context.all_reduce(_dense(F.conv2d(x, weight, None, *how)), axis)
        return y if bias is None else y.add_(bias.view(-1, 1, 1))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer, how = ctx.layer, ctx.how
        needs_input, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        pending = of_input = of_weight = of_bias = None
        if needs_input:
            of_input = _dense(_backward(gradient, x, weight, how, of_input=True))
            pending = layer.context.start_all_reduce(of_input, layer.layout.output)

        def weight_gradient() -> torch.Tensor:
            return _backward(gradient, x, weight, how, of_input=False)

        def accumulate() -> None:
            if needs_weight:
                add_gradient(layer.weight, weight_gradient())
            if needs_bias:
                add_gradient(layer.bias, gradient.sum((0, 2, 3)))

        queue = layer.weight_gradients
        if queue is not None:
            queue.add(accumulate)
        else:
            of_weight = weight_gradient() if needs_weight else None
            of_bias = gradient.sum((0, 2, 3)) if needs_bias else None
        if pending is not None:
            pending.wait()
        return of_input, of_weight, of_bias, None, None


def _backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, how: _Geometry, *, of_input: bool
) -> torch.Tensor:
    """The gradient of the input, or else that of the weight."""
    found: torch.Tensor = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        None,
        how.stride,
        how.padding,
        how.dilation,
        False,
        (0, 0),
        how.groups,
        (of_input, not of_input, False),
    )[0 if of_input else 1]
    return found


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Images [batch, channels, height, width], on a GPU in the order in memory in which its convolutions compute; what
    follows keeps it. A CPU's take any."""
    return x if x.is_cpu else x.contiguous(memory_format=torch.channels_last)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Such that it can be reduced as it lies, which is the same on every rank."""
    return x if not x.is_cpu and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
