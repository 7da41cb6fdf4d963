"""The outline of a diffusion U-Net for the performance model."""

from __future__ import annotations

from axonn.models.unet.unet_config import UNetConfig, UNetLink, unet_links, work_of
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
    # Equal links share their parts, whose times are then computed once.
    shared: dict[object, dict[str, LayerCost]] = {}
    for link in unet_links(model):
        travels = [link.output, *link.skips]
        elements = model.time_width + sum(channels * size**2 for channels, size in travels)
        last = link.kind == "output"
        parts = _unet_parts(model, link)
        parts = shared.setdefault(tuple(parts.items()), parts)
        handed_on = 0 if last else elements
        cost = work_of(model, link).flops
        links.append(OutlineLink(name=link.name, parts=parts, block=link.block, handed_on=handed_on, cost=cost))
    return ModelOutline(
        links=links,
        loss=WholeLossCost(elements=model.channels * model.image_size**2),
        name=model.name,
        flops=model.training_flops(recompute=False),
        flops_recomputing=model.training_flops(recompute=True),
    )


def _unet_parts(model: UNetConfig, link: UNetLink) -> dict[str, LayerCost]:
    """The layers of a link; what they work on lies along row, and so does what they hand on."""
    channels, size = link.output
    inputs, pixels, time = sum(link.inputs), size**2, model.time_width
    norm = GroupNormCost(groups=model.groups, segments=link.inputs, positions=pixels)
    across = RedistributionCost(elements=channels * pixels, source="col", target="row")
    match link.kind:
        case "input":
            # Neither images nor time steps have gradients.
            return {
                "conv": LinearCost(
                    positions=pixels,
                    inputs=inputs,
                    outputs=channels,
                    kernel=9,
                    layout=(None, "row"),
                    input_gradient=False,
                ),
                "time1": LinearCost(
                    positions=1, inputs=model.width, outputs=time, layout=(None, "col"), input_gradient=False
                ),
                "silu1": ActivationCost(kind="silu", positions=1, features=time, axis="col"),
                "time2": LinearCost(positions=1, inputs=time, outputs=time, layout=TRANSPOSED),
                "silu2": ActivationCost(kind="silu", positions=1, features=time, axis="row"),
            }
        case "residual":
            parts: dict[str, LayerCost] = {}
            if link.joins:
                joined = inputs * pixels
                parts["join"] = RearrangementCost(kind="concatenate", positions=pixels, features=inputs, inputs=joined)
            parts |= {
                "norm1": norm,
                "silu1": ActivationCost(kind="silu", positions=pixels, features=inputs, axis="row"),
                "conv1": LinearCost(positions=pixels, inputs=inputs, outputs=channels, kernel=9),
                "time": LinearCost(positions=1, inputs=time, outputs=channels),
                "add_time": ResidualCost(positions=pixels, features=channels, axis="col"),
                "norm2": GroupNormCost(groups=model.groups, segments=(channels,), axis="col", positions=pixels),
                "silu2": ActivationCost(kind="silu", positions=pixels, features=channels, axis="col"),
            }
            if model.dropout:
                parts["dropout"] = DropoutCost(positions=pixels, features=channels, axis="col")
            parts["conv2"] = LinearCost(
                positions=pixels, inputs=channels, outputs=channels, kernel=9, layout=TRANSPOSED
            )
            if link.shortcut:
                parts["shortcut"] = LinearCost(positions=pixels, inputs=inputs, outputs=channels, image=True)
                parts["redistribute"] = across
            parts["residual"] = ResidualCost(positions=pixels, features=channels)
            return parts
        case "attention":
            return {
                "norm": norm,
                "in_proj": LinearCost(positions=pixels, inputs=channels, outputs=3 * channels),
                "core": AttentionCoreCost(
                    positions=pixels, heads=channels // model.head_channels, width=model.head_channels, causal=False
                ),
                "out_proj": LinearCost(positions=pixels, inputs=channels, outputs=channels, layout=TRANSPOSED),
                "residual": ResidualCost(positions=pixels, features=channels),
            }
        case "down":
            conv = LinearCost(positions=pixels, inputs=inputs, outputs=channels, kernel=9, input_positions=4 * pixels)
            return {"conv": conv, "redistribute": across}
        case "up":
            small = RedistributionCost(elements=channels * (pixels // 4), source="row", target="col")
            read = inputs * (pixels // 4)
            larger = RearrangementCost(kind="upsample", positions=pixels, features=inputs, inputs=read, axis="col")
            conv = LinearCost(positions=pixels, inputs=inputs, outputs=channels, kernel=9, layout=TRANSPOSED)
            return {"redistribute": small, "upsample": larger, "conv": conv}
        case "output":
            conv = LinearCost(positions=pixels, inputs=inputs, outputs=channels, kernel=9, layout=("row", None))
            silu = ActivationCost(kind="silu", positions=pixels, features=inputs, axis="row")
            return {"norm": norm, "silu": silu, "conv": conv}
