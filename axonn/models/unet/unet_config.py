"""Configuration of a diffusion U-Net, the links of its chain, and the work of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from axonn.config.model_config import ModelConfig

NoiseSchedule = Literal["linear", "cosine"]


class UNetConfig(ModelConfig):
    """A U-Net that predicts the noise in an image, after Ho, Jain & Abbeel, arXiv 2006.11239.

    Level l has images of `image_size` / 2^l pixels a side and `width` x `multipliers[l]` channels. It has `blocks`
    residual blocks on the way down, and one more on the way up. An attention block follows each residual block of the
    levels `attention_levels` (0 is the full resolution), and the first one in the middle; a head has `head_channels`
    channels. `channels`: of the images. `groups`: of every group norm. `noise_steps`, `noise_schedule`: see
    `axonn.data.diffusion`.
    """

    kind: Literal["unet"] = "unet"
    image_size: int = Field(ge=1)
    channels: int = Field(default=3, ge=1)
    width: int = Field(ge=2)
    multipliers: tuple[int, ...] = Field(min_length=1, strict=False)
    blocks: int = Field(ge=1)
    attention_levels: tuple[int, ...] = Field(default=(), strict=False)
    head_channels: int = Field(ge=1)
    groups: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    noise_steps: int = Field(default=1000, ge=1)
    noise_schedule: NoiseSchedule = "linear"

    sample_unit: ClassVar[str] = "images"
    default_data: ClassVar[str] = "scikit-learn's digits"
    predicted_when_uneven: ClassVar[bool] = True

    def model_post_init(self, context: Any) -> None:
        if min(self.multipliers) < 1:
            raise ValueError(f"multipliers {list(self.multipliers)} must be positive")
        halvings = len(self.multipliers) - 1
        if self.image_size % 2**halvings:
            raise ValueError(
                f"image_size ({self.image_size}) is halved {halvings} times, once per level after the first, so it "
                f"must be a multiple of {2**halvings}"
            )
        if self.width % 2:
            raise ValueError(f"width ({self.width}) must be even: the time embedding is half sines and half cosines")
        unknown = [level for level in self.attention_levels if not 0 <= level <= halvings]
        if unknown:
            raise ValueError(f"attention_levels has {unknown[0]}, but multipliers makes the levels 0 to {halvings}")
        for multiplier in self.multipliers:
            if self.width * multiplier % self.groups:
                raise ValueError(f"width x {multiplier} ({self.width * multiplier}) must be a multiple of groups")
        for level in {*self.attention_levels, halvings}:
            channels = self.width * self.multipliers[level]
            if channels % self.head_channels:
                raise ValueError(f"the {channels} channels of level {level} must be a multiple of head_channels")

    @property
    def time_width(self) -> int:
        """Features of the time embedding."""
        return 4 * self.width

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(work_of(self, link).parameters for link in unet_links(self))

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the forward of one image.

        Convolutions and matrix products count, 2 for each multiply-add; norms, activations, softmax, biases and all
        other additions do not.
        """
        return sum(work_of(self, link).flops for link in unet_links(self))

    @property
    def units_per_sample(self) -> int:
        """One, since images are what is counted."""
        return 1

    def training_flops(self, *, recompute: bool) -> float:
        """Return the FLOPs of training on one image: a backward counts as two forwards, recomputation as one."""
        return (4 if recompute else 3) * self.forward_flops

    def flops_formula(self, *, recompute: bool) -> str:
        """Return the formula of `training_flops` as text, for records and tables."""
        name = "activation recompute" if recompute else "no recompute"
        return f"{4 if recompute else 3} x forward of convolutions and matrix products ({name})"

    def workload(self) -> dict[str, int]:
        """Return the size by which records describe the workload."""
        return {"forward_flops": self.forward_flops}


LinkKind = Literal["input", "residual", "attention", "down", "up", "output"]


class Maps(NamedTuple):
    """A tensor of `channels` maps of `size` x `size` pixels per image."""

    channels: int
    size: int

    @property
    def pixels(self) -> int:
        """Pixels of one map."""
        return self.size**2


@dataclass(frozen=True, kw_only=True)
class UNetLink:
    """One link of the chain.

    `inputs`: channels of its inputs, two if a skip connection is concatenated. `output`: maps that it passes on, along
    with the time embedding and the pending skip connections `skips` (the last is used first). `keeps`: its input
    becomes a skip connection. `block`: see `axonn.models.base.Layer`.
    """

    name: str
    kind: LinkKind
    inputs: tuple[int, ...]
    output: Maps
    keeps: bool
    block: int | None
    skips: tuple[Maps, ...]

    @property
    def joins(self) -> bool:
        """True if the last skip connection is concatenated to its input."""
        return len(self.inputs) > 1

    @property
    def shortcut(self) -> bool:
        """True if a residual block needs a convolution on its shortcut: the width changes, or there are two inputs."""
        return self.kind == "residual" and self.inputs != (self.output.channels,)


def unet_links(config: UNetConfig) -> tuple[UNetLink, ...]:
    """Return the links of the chain, first to last."""
    chain = _Chain(config)
    widths = [config.width * multiplier for multiplier in config.multipliers]
    last = len(widths) - 1
    for level, channels in enumerate(widths):
        for i in range(config.blocks):
            chain.residual(f"down{level}", i, channels, keeps=True, attention=level in config.attention_levels)
        if level < last:
            chain.add(f"down{level}_sample", "down", channels, size=chain.maps.size // 2, keeps=True)
    chain.residual("middle", 0, widths[last], keeps=True, attention=True)
    chain.residual("middle", 1, widths[last])
    for level in range(last, -1, -1):
        for i in range(config.blocks + 1):
            attention = level in config.attention_levels
            chain.residual(f"up{level}", i, widths[level], joins=True, attention=attention)
        if level:
            chain.add(f"up{level}_sample", "up", widths[level], size=chain.maps.size * 2)
    chain.end()
    return tuple(chain.links)


class _Chain:
    """Builder of the chain, link by link."""

    def __init__(self, config: UNetConfig) -> None:
        self._config = config
        self._skips: list[Maps] = []
        self._block: int | None = None
        self.maps = Maps(config.channels, config.image_size)
        """Output of the last link."""
        self.links: list[UNetLink] = []
        self.add("input", "input", config.width)

    def residual(
        self, place: str, i: int, channels: int, *, keeps: bool = False, joins: bool = False, attention: bool = False
    ) -> None:
        """Add a residual block, and the attention that may follow it."""
        self._block = 0 if self._block is None else self._block + 1
        self.add(f"{place}_residual{i}", "residual", channels, keeps=keeps, joins=joins)
        if attention:
            self.add(f"{place}_attention{i}", "attention", channels)

    def end(self) -> None:
        self._block = None
        self.add("output", "output", self._config.channels)

    def add(
        self, name: str, kind: LinkKind, channels: int, *, size: int = 0, keeps: bool = False, joins: bool = False
    ) -> None:
        if keeps:
            self._skips.append(self.maps)
        inputs = (self.maps.channels, self._skips.pop().channels) if joins else (self.maps.channels,)
        self.maps = Maps(channels, size or self.maps.size)
        self.links.append(
            UNetLink(
                name=name,
                kind=kind,
                inputs=inputs,
                output=self.maps,
                keeps=keeps,
                block=self._block,
                skips=tuple(self._skips),
            )
        )


class LinkWork(NamedTuple):
    """Trainable parameters, and floating-point operations of the forward of one image."""

    parameters: int
    flops: int


def work_of(config: UNetConfig, link: UNetLink) -> LinkWork:
    """Return the parameters and the work of one link, counted as in `UNetConfig.forward_flops`."""
    channels, size = link.output
    inputs, time = sum(link.inputs), config.time_width
    match link.kind:
        case "input":
            parts = [_convolution(inputs, channels, size), _linear(config.width, time), _linear(time, time)]
        case "residual":
            parts = [_norm(inputs), _convolution(inputs, channels, size), _linear(time, channels)]
            parts += [_norm(channels), _convolution(channels, channels, size)]
            parts += [_convolution(inputs, channels, size, kernel=1)] if link.shortcut else []
        case "attention":
            pixels = link.output.pixels
            products = LinkWork(0, 4 * pixels**2 * channels)
            parts = [_norm(channels), _linear(channels, 3 * channels, rows=pixels), products]
            parts += [_linear(channels, channels, rows=pixels)]
        case "down" | "up":
            parts = [_convolution(inputs, channels, size)]
        case "output":
            parts = [_norm(inputs), _convolution(inputs, channels, size)]
    return _sum(parts)


def _sum(parts: Iterable[LinkWork]) -> LinkWork:
    parameters, flops = zip(*parts, strict=True)
    return LinkWork(sum(parameters), sum(flops))


def _convolution(inputs: int, outputs: int, size: int, *, kernel: int = 3) -> LinkWork:
    """Return the work of a convolution whose output maps have `size` x `size` pixels."""
    weights = inputs * outputs * kernel**2
    return LinkWork(weights + outputs, 2 * weights * size**2)


def _linear(inputs: int, outputs: int, *, rows: int = 1) -> LinkWork:
    return LinkWork(inputs * outputs + outputs, 2 * rows * inputs * outputs)


def _norm(channels: int) -> LinkWork:
    return LinkWork(2 * channels, 0)
