"""Outline of a diffusion U-Net for the performance model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from axonn.models.unet.unet_config import LinkKind, UNetConfig, UNetLink, unet_links, work_of
from axonn.perf.layers.layer_cost import TRANSPOSED, GroupNormCost, LayerCost, LinearCost, RedistributionCost
from axonn.perf.layers.local_layers import (
    ActivationCost,
    AttentionCoreCost,
    DropoutCost,
    RearrangementCost,
    ResidualCost,
    WholeLossCost,
)
from axonn.perf.layers.model_outline import ModelOutline, OutlineLink


def unet_outline(model: UNetConfig) -> ModelOutline:
    """Return the chain of `axonn.models.unet.unet_model.UNet` with what each layer computes, keeps and sends."""
    links = []
    # Equal links share one dict of layers, so that their times are computed once.
    shared: dict[object, dict[str, LayerCost]] = {}
    for link in unet_links(model):
        layers = _LAYERS[link.kind](model, link)
        layers = shared.setdefault(tuple(layers.items()), layers)
        elements = model.time_width + sum(maps.channels * maps.pixels for maps in (link.output, *link.skips))
        handed_on = 0 if link.kind == "output" else elements
        cost = work_of(model, link).flops
        links.append(OutlineLink(name=link.name, parts=layers, block=link.block, handed_on=handed_on, cost=cost))
    return ModelOutline(
        links=links,
        loss=WholeLossCost(elements=model.channels * model.image_size**2),
        name=model.name,
        flops=model.training_flops(recompute=False),
        flops_recomputing=model.training_flops(recompute=True),
    )


def _input_norm(model: UNetConfig, link: UNetLink) -> GroupNormCost:
    return GroupNormCost(groups=model.groups, segments=link.inputs, positions=link.output.pixels)


def _output_redistribution(link: UNetLink) -> RedistributionCost:
    return RedistributionCost(elements=link.output.channels * link.output.pixels, source="col", target="row")


def _input_layers(model: UNetConfig, link: UNetLink) -> dict[str, LayerCost]:
    time = model.time_width
    # Neither images nor time steps have gradients.
    return {
        "conv": LinearCost(
            positions=link.output.pixels,
            inputs=sum(link.inputs),
            outputs=link.output.channels,
            kernel=9,
            layout=(None, "row"),
            input_gradient=False,
        ),
        "time1": LinearCost(positions=1, inputs=model.width, outputs=time, layout=(None, "col"), input_gradient=False),
        "silu1": ActivationCost(kind="silu", positions=1, features=time, axis="col"),
        "time2": LinearCost(positions=1, inputs=time, outputs=time, layout=TRANSPOSED),
        "silu2": ActivationCost(kind="silu", positions=1, features=time, axis="row"),
    }


def _residual_layers(model: UNetConfig, link: UNetLink) -> dict[str, LayerCost]:
    inputs, channels, pixels = sum(link.inputs), link.output.channels, link.output.pixels
    layers: dict[str, LayerCost] = {}
    if link.joins:
        layers["join"] = RearrangementCost(
            kind="concatenate", positions=pixels, features=inputs, inputs=inputs * pixels
        )
    layers |= {
        "norm1": _input_norm(model, link),
        "silu1": ActivationCost(kind="silu", positions=pixels, features=inputs, axis="row"),
        "conv1": LinearCost(positions=pixels, inputs=inputs, outputs=channels, kernel=9),
        "time": LinearCost(positions=1, inputs=model.time_width, outputs=channels),
        "add_time": ResidualCost(positions=pixels, features=channels, axis="col"),
        "norm2": GroupNormCost(groups=model.groups, segments=(channels,), axis="col", positions=pixels),
        "silu2": ActivationCost(kind="silu", positions=pixels, features=channels, axis="col"),
    }
    if model.dropout:
        layers["dropout"] = DropoutCost(positions=pixels, features=channels, axis="col")
    layers["conv2"] = LinearCost(positions=pixels, inputs=channels, outputs=channels, kernel=9, layout=TRANSPOSED)
    if link.shortcut:
        layers["shortcut"] = LinearCost(positions=pixels, inputs=inputs, outputs=channels, image=True)
        layers["redistribute"] = _output_redistribution(link)
    layers["residual"] = ResidualCost(positions=pixels, features=channels)
    return layers


def _attention_layers(model: UNetConfig, link: UNetLink) -> dict[str, LayerCost]:
    channels, pixels = link.output.channels, link.output.pixels
    return {
        "norm": _input_norm(model, link),
        "in_proj": LinearCost(positions=pixels, inputs=channels, outputs=3 * channels),
        "core": AttentionCoreCost(
            positions=pixels, heads=channels // model.head_channels, width=model.head_channels, causal=False
        ),
        "out_proj": LinearCost(positions=pixels, inputs=channels, outputs=channels, layout=TRANSPOSED),
        "residual": ResidualCost(positions=pixels, features=channels),
    }


def _down_layers(model: UNetConfig, link: UNetLink) -> dict[str, LayerCost]:
    pixels = link.output.pixels
    conv = LinearCost(
        positions=pixels,
        inputs=sum(link.inputs),
        outputs=link.output.channels,
        kernel=9,
        input_positions=4 * pixels,
    )
    return {"conv": conv, "redistribute": _output_redistribution(link)}


def _up_layers(model: UNetConfig, link: UNetLink) -> dict[str, LayerCost]:
    inputs, channels, pixels = sum(link.inputs), link.output.channels, link.output.pixels
    input_pixels = pixels // 4
    return {
        "redistribute": RedistributionCost(elements=channels * input_pixels, source="row", target="col"),
        "upsample": RearrangementCost(
            kind="upsample", positions=pixels, features=inputs, inputs=inputs * input_pixels, axis="col"
        ),
        "conv": LinearCost(positions=pixels, inputs=inputs, outputs=channels, kernel=9, layout=TRANSPOSED),
    }


def _output_layers(model: UNetConfig, link: UNetLink) -> dict[str, LayerCost]:
    inputs, pixels = sum(link.inputs), link.output.pixels
    return {
        "norm": _input_norm(model, link),
        "silu": ActivationCost(kind="silu", positions=pixels, features=inputs, axis="row"),
        "conv": LinearCost(
            positions=pixels, inputs=inputs, outputs=link.output.channels, kernel=9, layout=("row", None)
        ),
    }


_LAYERS: Mapping[LinkKind, Callable[[UNetConfig, UNetLink], dict[str, LayerCost]]] = {
    "input": _input_layers,
    "residual": _residual_layers,
    "attention": _attention_layers,
    "down": _down_layers,
    "up": _up_layers,
    "output": _output_layers,
}
"""Layers of each kind of link; both what they work on and what they pass on is cut along row."""
