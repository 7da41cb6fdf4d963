"""The diffusion U-Net (Ho, Jain & Abbeel, arXiv 2006.11239): residual blocks with a time embedding, attention, skips.

Links pass on the images, [batch, channels / G_row, size, size]; the time embedding, [batch, time / G_row]; and the
pending skip connections, which are sharded like the images. So the pipeline can be cut between any two links.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from axonn import tensor
from axonn.distributed.tensor_spec import TensorSpec
from axonn.grid import ProcessGrid
from axonn.models.base import Layer
from axonn.models.initialization import Constant, Initial, Normal
from axonn.models.unet.unet_config import LinkKind, Maps, UNetConfig, UNetLink, unet_links, work_of
from axonn.tensor import TRANSPOSED, Layout, Requirement, TensorAxis, TensorContext, check_fit, redistribute
from axonn.tensor.layers.conv import channels_last

Tensors = tuple[torch.Tensor, ...]
SMALL = 0.1
"""Scale of the initial weights of the last layer of each branch and of the network. They are often initialized to zero;
then the first gradients of the layers before them would be zero, and an error there would not show."""


class Input(nn.Module):
    """Images [batch, channels, size, size] and time steps [batch] -> images of `width` channels, and time embedding.

    The input images, and the sines and cosines of the time steps, are replicated on every rank.
    """

    def __init__(self, config: UNetConfig, link: UNetLink, context: TensorContext) -> None:
        super().__init__()
        self.width = config.width
        time = config.time_width
        self.conv = tensor.Conv2d(
            config.channels, config.width, 3, padding=1, context=context, layout=Layout(None, "row")
        )
        self.time1 = tensor.Linear(config.width, time, context=context, layout=Layout(None, "col"))
        self.time2 = tensor.Linear(time, time, context=context, layout=TRANSPOSED)

    def forward(self, images: torch.Tensor, timesteps: torch.Tensor) -> Tensors:
        dtype = self.conv.weight.dtype
        waves = sinusoids(timesteps, self.width).to(dtype)
        time = F.silu(self.time2(F.silu(self.time1(waves))))
        return self.conv(channels_last(images.to(dtype))), time


def sinusoids(timesteps: torch.Tensor, width: int) -> torch.Tensor:
    """Return sines and cosines of the time steps, [batch, width] float64, with wavelengths of 2 pi to 20,000 pi.

    The position encoding of Vaswani et al., arXiv 1706.03762, applied to time.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / max(1, half - 1)
    angles = timesteps.to(torch.float64).unsqueeze(-1) * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], -1)


class ResidualBlock(nn.Module):
    """x + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + time)))): a normal and a transposed convolution.

    x is first concatenated with the last skip connection if the link `joins` one. If it is not as wide as the output,
    or its channels are cut in two segments, the shortcut is a 1x1 convolution, whose output is redistributed.
    """

    def __init__(self, config: UNetConfig, link: UNetLink, context: TensorContext) -> None:
        super().__init__()
        self.link, self.context = link, context
        segments, inputs, outputs = link.inputs, sum(link.inputs), link.output.channels
        self.norm1 = tensor.GroupNorm(config.groups, inputs, context=context, segments=segments)
        self.conv1 = tensor.Conv2d(inputs, outputs, 3, padding=1, context=context, in_segments=segments)
        self.time = tensor.Linear(config.time_width, outputs, context=context)
        self.norm2 = tensor.GroupNorm(config.groups, outputs, context=context, axis="col")
        self.dropout = tensor.Dropout(config.dropout, name=f"{link.name}.dropout", context=context, cuts=((1, "col"),))
        self.conv2 = tensor.Conv2d(outputs, outputs, 3, padding=1, context=context, layout=TRANSPOSED)
        self.shortcut = (
            tensor.Conv2d(inputs, outputs, 1, context=context, in_segments=segments) if link.shortcut else None
        )

    def forward(self, x: torch.Tensor, time: torch.Tensor, *skips: torch.Tensor) -> Tensors:
        x = channels_last(x)
        kept = (*skips, x) if self.link.keeps else skips
        if self.link.joins:
            x = torch.cat([x, kept[-1]], 1)
            kept = kept[:-1]
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if self.shortcut is not None:
            x = redistribute(self.shortcut(x), 1, source="col", target="row", context=self.context)
        return x + h, time, *kept


class UNetAttention(nn.Module):
    """x + attention(norm(x)) between all pixels of an image. Each rank computes heads / G_col complete heads."""

    def __init__(self, config: UNetConfig, link: UNetLink, context: TensorContext) -> None:
        super().__init__()
        channels = link.output.channels
        self.norm = tensor.GroupNorm(config.groups, channels, context=context)
        self.attention = tensor.MultiheadAttention(
            channels, channels // config.head_channels, context=context, name=f"{link.name}.attention"
        )

    def forward(self, x: torch.Tensor, time: torch.Tensor, *skips: torch.Tensor) -> Tensors:
        x = channels_last(x)
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        h: torch.Tensor = self.attention(pixels)
        return x + h.transpose(1, 2).reshape(x.shape), time, *skips


class Down(nn.Module):
    """Down-sampling by 2 per side: a convolution of stride 2, whose output is redistributed."""

    def __init__(self, config: UNetConfig, link: UNetLink, context: TensorContext) -> None:
        super().__init__()
        self.context = context
        channels = link.output.channels
        self.conv = tensor.Conv2d(channels, channels, 3, stride=2, padding=1, context=context)

    def forward(self, x: torch.Tensor, time: torch.Tensor, *skips: torch.Tensor) -> Tensors:
        x = channels_last(x)
        y = redistribute(self.conv(x), 1, source="col", target="row", context=self.context)
        return y, time, *skips, x


class Up(nn.Module):
    """Up-sampling by 2 per side: nearest neighbour, then a convolution; redistributed first, while it is small."""

    def __init__(self, config: UNetConfig, link: UNetLink, context: TensorContext) -> None:
        super().__init__()
        self.context = context
        channels = link.output.channels
        self.conv = tensor.Conv2d(channels, channels, 3, padding=1, context=context, layout=TRANSPOSED)

    def forward(self, x: torch.Tensor, time: torch.Tensor, *skips: torch.Tensor) -> Tensors:
        x = channels_last(redistribute(x, 1, source="row", target="col", context=self.context))
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), time, *skips


class Output(nn.Module):
    """The predicted noise, [batch, channels of the images, size, size], replicated on every rank."""

    def __init__(self, config: UNetConfig, link: UNetLink, context: TensorContext) -> None:
        super().__init__()
        (inputs,) = link.inputs
        self.norm = tensor.GroupNorm(config.groups, inputs, context=context)
        self.conv = tensor.Conv2d(
            inputs, link.output.channels, 3, padding=1, context=context, layout=Layout("row", None)
        )

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        noise: torch.Tensor = self.conv(F.silu(self.norm(channels_last(x))))
        return noise


_MODULES: dict[LinkKind, Callable[[UNetConfig, UNetLink, TensorContext], nn.Module]] = {
    "input": Input,
    "residual": ResidualBlock,
    "attention": UNetAttention,
    "down": Down,
    "up": Up,
    "output": Output,
}
_ENDS = ("conv2.weight", "attention.out_proj.weight")
"""Weights of the last layer of the branch that a link adds to its input."""


class UNet:
    """The U-Net as a `PipelineModel`: input, residual blocks, attention, sampling convolutions and output, a link each.

    A residual block with the attention and sampling that follow it is one block of activation checkpointing.
    """

    def __init__(self, config: UNetConfig) -> None:
        self.config = config
        self.links = unet_links(config)
        self.layers: Sequence[Layer] = tuple(
            Layer(
                name=link.name,
                build=partial(_MODULES[link.kind], config, link),
                cost=work_of(config, link).flops,
                block=link.block,
            )
            for link in self.links
        )
        self.ties: Sequence[tuple[str, str]] = ()
        self._shapes: dict[str, dict[str, torch.Size]] = {}

    def check(self, grid: ProcessGrid) -> None:
        layers: dict[tuple[str, int, TensorAxis], list[str]] = {}
        for requirement in self._requirements():
            layers.setdefault((requirement.quantity, requirement.size, requirement.axis), []).append(requirement.layer)
        check_fit(grid, *(Requirement(_listed(names), *rest) for rest, names in layers.items()))

    def initial(self, name: str) -> Initial:
        """Return normal weights of deviation 1/sqrt(inputs), scaled by `SMALL` in last layers; norms 1, biases 0."""
        layer, _, rest = name.partition(".")
        shape = self._shapes_of(layer)[rest]
        if rest.endswith("bias"):
            return Constant(0.0)
        if len(shape) == 1:
            return Constant(1.0)
        ends = rest in _ENDS or (layer, rest) == ("output", "conv.weight")
        return Normal((SMALL if ends else 1.0) / math.sqrt(shape[1:].numel()))

    def activation(
        self, layer: int, microbatch_size: int, dtype: torch.dtype, context: TensorContext
    ) -> tuple[TensorSpec, ...]:
        def spec(maps: Maps, axis: TensorAxis | None = "row") -> TensorSpec:
            channels = context.part(maps.channels, axis, "channels")
            return TensorSpec((microbatch_size, channels, maps.size, maps.size), dtype)

        link = self.links[layer]
        if link.kind == "output":
            return (spec(link.output, None),)
        time = context.part(self.config.time_width, "row", "features of the time embedding")
        return spec(link.output), TensorSpec((microbatch_size, time), dtype), *map(spec, link.skips)

    def loss(self, output: torch.Tensor, targets: torch.Tensor, context: TensorContext) -> torch.Tensor:
        """Return the mean squared error of the predicted noise, in float32 or wider."""
        wide = torch.promote_types(output.dtype, torch.float32)
        return F.mse_loss(output.to(wide), targets.to(wide))

    def _requirements(self) -> Iterator[Requirement]:
        """Yield the sizes that the tensor axes must divide, link by link."""
        time = self.config.time_width
        yield Requirement("input", "features of the time embedding", time, "row")
        yield Requirement("input", "features of the time embedding", time, "col")
        for link in self.links:
            channels = link.output.channels
            rows = (*link.inputs, channels)
            # The channels of images are never cut.
            rows = rows[1:] if link.kind == "input" else rows[:-1] if link.kind == "output" else rows
            for size in rows:
                yield Requirement(link.name, "channels", size, "row")
            if link.kind in ("residual", "down", "up"):
                yield Requirement(link.name, "channels", channels, "col")
            elif link.kind == "attention":
                yield Requirement(link.name, "heads", channels // self.config.head_channels, "col")

    def _shapes_of(self, layer: str) -> dict[str, torch.Size]:
        """Return the global shapes of the parameters of one link."""
        if layer not in self._shapes:
            (link,) = [link for link in self.layers if link.name == layer]
            with torch.device("meta"):
                module = link.build(TensorContext.serial())
            self._shapes[layer] = {name: parameter.shape for name, parameter in module.named_parameters()}
        return self._shapes[layer]


def _listed(names: Sequence[str]) -> str:
    """Return the first of the distinct names, and the second or how many more there are."""
    first, *others = dict.fromkeys(names)
    return f"{first} and {len(others)} more" if len(others) > 1 else " and ".join([first, *others])
