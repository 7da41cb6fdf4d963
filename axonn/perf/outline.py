"""What models are made of, as far as communication goes: the chains of `axonn.models`, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from axonn.config import GPTConfig, ModelConfig, UNetConfig
from axonn.grid import ProcessGrid
from axonn.perf.parts import (
    TRANSPOSED,
    CrossEntropy,
    Embedding,
    GroupNorm,
    Linear,
    Norm,
    Part,
    Relayout,
    WholeLoss,
)
from axonn.unet_config import UNetLink, unet_links


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link of the chain that inter-layer parallelism cuts: its layers by name, in the order in which they run.

    `block`: number of the block that it is part of, which activation checkpointing recomputes; None outside of blocks.
    `handed_on`: elements of what it hands to the next link, for one row; all of it is cut along row.
    """

    name: str
    parts: Mapping[str, Part]
    block: int | None = None
    handed_on: int = 0

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        """Elements of each parameter on one rank, by full name."""
        return {
            f"{self.name}.{part}.{own}": elements
            for part, layer in self.parts.items()
            for own, elements in layer.parameters(grid).items()
        }

    def message(self, grid: ProcessGrid, rows: int) -> int:
        """Elements that a rank hands to the next link."""
        return rows * self.handed_on // grid.row


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model: its chain, its loss, and the pairs of full names that are one parameter."""

    links: Sequence[Link]
    loss: Part
    ties: Sequence[tuple[str, str]] = field(default=())


def outline_of(model: ModelConfig) -> Outline:
    """The chain of the model in `axonn.models`."""
    return _gpt(model) if isinstance(model, GPTConfig) else _unet(model)


def _gpt(model: GPTConfig) -> Outline:
    m, places = model, model.seq_len
    activation = places * m.hidden
    norm = Norm(positions=places, features=m.hidden)
    embedding: dict[str, Part] = {
        "tokens": Embedding(positions=places, entries=m.vocab, features=m.hidden),
        "positions": Embedding(positions=places, entries=m.seq_len, features=m.hidden, layout=(None, "row")),
    }
    attention: dict[str, Part] = {
        "norm": norm,
        "qkv": Linear(positions=places, inputs=m.hidden, outputs=3 * m.hidden),
        "projection": Linear(positions=places, inputs=m.hidden, outputs=m.hidden, layout=TRANSPOSED),
    }
    feed_forward: dict[str, Part] = {
        "norm": norm,
        "fc1": Linear(positions=places, inputs=m.hidden, outputs=4 * m.hidden),
        "fc2": Linear(positions=places, inputs=4 * m.hidden, outputs=m.hidden, layout=TRANSPOSED),
    }
    head: dict[str, Part] = {
        "norm": norm,
        "output": Linear(positions=places, inputs=m.hidden, outputs=m.vocab, bias=False),
    }
    links = [Link(name="embedding", parts=embedding, handed_on=activation)]
    for i in range(m.layers):
        links.append(Link(name=f"attention{i}", parts=attention, block=i, handed_on=activation))
        links.append(Link(name=f"mlp{i}", parts=feed_forward, block=i, handed_on=activation))
    links.append(Link(name="head", parts=head))
    ties = (("embedding.tokens.weight", "head.output.weight"),) if m.tied_head else ()
    return Outline(links=links, loss=CrossEntropy(positions=places), ties=ties)


def _unet(model: UNetConfig) -> Outline:
    links = []
    for link in unet_links(model):
        travels = [link.output, *link.skips]
        elements = model.time_width + sum(channels * size**2 for channels, size in travels)
        last = link.kind == "output"
        parts = _unet_parts(model, link)
        links.append(Link(name=link.name, parts=parts, block=link.block, handed_on=0 if last else elements))
    return Outline(links=links, loss=WholeLoss())


def _unet_parts(model: UNetConfig, link: UNetLink) -> dict[str, Part]:
    """The layers of a link; what they work on lies along row, and so does what they hand on."""
    channels, size = link.output
    inputs, pixels, time = sum(link.inputs), size**2, model.time_width
    norm = GroupNorm(groups=model.groups, segments=link.inputs)
    across = Relayout(elements=channels * pixels, source="col", target="row")
    match link.kind:
        case "input":
            # Neither images nor time steps have gradients.
            return {
                "conv": Linear(
                    positions=pixels,
                    inputs=inputs,
                    outputs=channels,
                    kernel=9,
                    layout=(None, "row"),
                    input_gradient=False,
                ),
                "time1": Linear(
                    positions=1, inputs=model.width, outputs=time, layout=(None, "col"), input_gradient=False
                ),
                "time2": Linear(positions=1, inputs=time, outputs=time, layout=TRANSPOSED),
            }
        case "residual":
            parts: dict[str, Part] = {
                "norm1": norm,
                "conv1": Linear(positions=pixels, inputs=inputs, outputs=channels, kernel=9),
                "time": Linear(positions=1, inputs=time, outputs=channels),
                "norm2": GroupNorm(groups=model.groups, segments=(channels,), axis="col"),
                "conv2": Linear(positions=pixels, inputs=channels, outputs=channels, kernel=9, layout=TRANSPOSED),
            }
            if link.shortcut:
                parts["shortcut"] = Linear(positions=pixels, inputs=inputs, outputs=channels)
                parts["relayout"] = across
            return parts
        case "attention":
            return {
                "norm": norm,
                "in_proj": Linear(positions=pixels, inputs=channels, outputs=3 * channels),
                "out_proj": Linear(positions=pixels, inputs=channels, outputs=channels, layout=TRANSPOSED),
            }
        case "down":
            conv = Linear(positions=pixels, inputs=inputs, outputs=channels, kernel=9, input_positions=4 * pixels)
            return {"conv": conv, "relayout": across}
        case "up":
            small = Relayout(elements=channels * (pixels // 4), source="row", target="col")
            conv = Linear(positions=pixels, inputs=inputs, outputs=channels, kernel=9, layout=TRANSPOSED)
            return {"relayout": small, "conv": conv}
        case "output":
            conv = Linear(positions=pixels, inputs=inputs, outputs=channels, kernel=9, layout=("row", None))
            return {"norm": norm, "conv": conv}
