"""What models are made of, as far as the performance model goes: the chains of `axonn.models`, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from axonn.config import GPTConfig, ModelConfig, UNetConfig
from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.perf.local_parts import Activation, AttentionCore, Dropout, Rearranged, Residual, WholeLoss
from axonn.perf.parts import TRANSPOSED, CrossEntropy, Embedding, GroupNorm, Linear, Norm, Part, Relayout
from axonn.records import gpt_flops
from axonn.unet_config import UNetLink, unet_links, work_of


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link of the chain that inter-layer parallelism cuts: its layers by name, in the order in which they run.

    `block`: number of the block that it is part of, which activation checkpointing recomputes; None outside of blocks.
    `handed_on`: elements of what it hands to the next link, for one row; all of it is cut along row. `cost`: forward
    work of one row in FLOPs, by which stages are cut.
    """

    name: str
    parts: Mapping[str, Part]
    block: int | None = None
    handed_on: int = 0
    cost: float = 0.0

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
    """A model: its chain, its loss, and the pairs of full names that are one parameter.

    `flops`, `flops_recomputing`: of training on one row, without and with activation checkpointing.
    """

    links: Sequence[Link]
    loss: Part
    ties: Sequence[tuple[str, str]] = field(default=())
    name: str = "model"
    flops: float = 0.0
    flops_recomputing: float = 0.0

    def parameters(self, spans: Iterable[range], grid: ProcessGrid) -> dict[str, int]:
        """Elements of each parameter on a rank that holds the links `spans`; a tied one counts once, by its first
        name."""
        first_name = {second: first for first, second in self.ties}
        found: dict[str, int] = {}
        for span in spans:
            for i in span:
                for name, elements in self.links[i].parameters(grid).items():
                    found[first_name.get(name, name)] = elements
        return found


def outline_of(model: ModelConfig) -> Outline:
    """The chain of the model in `axonn.models`."""
    return _gpt(model) if isinstance(model, GPTConfig) else _unet(model)


def with_sequence_parallelism(outline: Outline) -> Outline:
    """The same model with the positions of the residual stream cut along col, where its features are repeated.

    Korthikanti et al., arXiv 2205.05198, section 4.2.2. Raises `ConfigError` for layers that mix positions.
    """
    parts = {part for link in outline.links for part in link.parts.values()}
    spread = {part: _spread(part, outline.name) for part in parts}
    links = [replace(link, parts={name: spread[part] for name, part in link.parts.items()}) for link in outline.links]
    return replace(outline, links=links)


def _spread(part: Part, model: str) -> Part:
    match part:
        case Linear(kernel=1, layout=("row", "col")):
            return replace(part, spread="input")
        case Linear(kernel=1, layout=("col", "row")):
            return replace(part, spread="output")
        case Norm() | Residual() | Dropout():
            return replace(part, spread="col") if part.axis == "row" else part
        case Embedding():
            return replace(part, spread="col") if part.layout[0] == "col" else part
        case AttentionCore() | Activation():
            return part
        case _:
            raise ConfigError(
                f"sequence parallelism is for chains of transformer layers; {model} has a {type(part).__name__}: "
                "set sequence_parallel to false"
            )


def _gpt(model: GPTConfig) -> Outline:
    m, places = model, model.seq_len
    activation = places * m.hidden
    norm = Norm(positions=places, features=m.hidden)
    embedding: dict[str, Part] = {
        "tokens": Embedding(positions=places, entries=m.vocab, features=m.hidden),
        "positions": Embedding(positions=places, entries=m.seq_len, features=m.hidden, layout=(None, "row")),
    }
    residual = Residual(positions=places, features=m.hidden, dropout=m.dropout > 0)
    if m.dropout:
        embedding["dropout"] = Dropout(positions=places, features=m.hidden)
    attention: dict[str, Part] = {
        "norm": norm,
        "qkv": Linear(positions=places, inputs=m.hidden, outputs=3 * m.hidden),
        "core": AttentionCore(
            positions=places,
            heads=m.heads,
            width=m.hidden // m.heads,
            causal=True,
            dropout=m.attention_dropout > 0,
        ),
        "projection": Linear(positions=places, inputs=m.hidden, outputs=m.hidden, layout=TRANSPOSED, fused_bias=True),
        "residual": residual,
    }
    feed_forward: dict[str, Part] = {
        "norm": norm,
        "fc1": Linear(positions=places, inputs=m.hidden, outputs=4 * m.hidden, fused_bias=True),
        "gelu": Activation(kind="gelu", positions=places, features=4 * m.hidden, axis="col"),
        "fc2": Linear(positions=places, inputs=4 * m.hidden, outputs=m.hidden, layout=TRANSPOSED, fused_bias=True),
        "residual": residual,
    }
    head: dict[str, Part] = {
        "norm": norm,
        "output": Linear(positions=places, inputs=m.hidden, outputs=m.vocab, bias=False),
    }
    links = [Link(name="embedding", parts=embedding, handed_on=activation, cost=m.cost("embedding"))]
    halves = ("attention", attention, m.cost("attention")), ("mlp", feed_forward, m.cost("mlp"))
    for i in range(m.layers):
        for name, parts, cost in halves:
            links.append(Link(name=f"{name}{i}", parts=parts, block=i, handed_on=activation, cost=cost))
    links.append(Link(name="head", parts=head, cost=m.cost("head")))
    ties = (("embedding.tokens.weight", "head.output.weight"),) if m.tied_head else ()
    sizes = {"batch": 1, "seq_len": m.seq_len, "layers": m.layers, "hidden": m.hidden, "vocab": m.vocab}
    return Outline(
        links=links,
        loss=CrossEntropy(positions=places, entries=m.vocab),
        ties=ties,
        name=m.name,
        flops=gpt_flops(**sizes, recompute=False),
        flops_recomputing=gpt_flops(**sizes, recompute=True),
    )


def _unet(model: UNetConfig) -> Outline:
    links = []
    # Equal links share their parts, whose times are then computed once.
    shared: dict[object, dict[str, Part]] = {}
    for link in unet_links(model):
        travels = [link.output, *link.skips]
        elements = model.time_width + sum(channels * size**2 for channels, size in travels)
        last = link.kind == "output"
        parts = _unet_parts(model, link)
        parts = shared.setdefault(tuple(parts.items()), parts)
        handed_on = 0 if last else elements
        cost = work_of(model, link).flops
        links.append(Link(name=link.name, parts=parts, block=link.block, handed_on=handed_on, cost=cost))
    return Outline(
        links=links,
        loss=WholeLoss(elements=model.channels * model.image_size**2),
        name=model.name,
        flops=3 * model.forward_flops,
        flops_recomputing=4 * model.forward_flops,
    )


def _unet_parts(model: UNetConfig, link: UNetLink) -> dict[str, Part]:
    """The layers of a link; what they work on lies along row, and so does what they hand on."""
    channels, size = link.output
    inputs, pixels, time = sum(link.inputs), size**2, model.time_width
    norm = GroupNorm(groups=model.groups, segments=link.inputs, positions=pixels)
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
                "silu1": Activation(kind="silu", positions=1, features=time, axis="col"),
                "time2": Linear(positions=1, inputs=time, outputs=time, layout=TRANSPOSED),
                "silu2": Activation(kind="silu", positions=1, features=time, axis="row"),
            }
        case "residual":
            parts: dict[str, Part] = {}
            if link.joins:
                joined = inputs * pixels
                parts["join"] = Rearranged(kind="concatenate", positions=pixels, features=inputs, inputs=joined)
            parts |= {
                "norm1": norm,
                "silu1": Activation(kind="silu", positions=pixels, features=inputs, axis="row"),
                "conv1": Linear(positions=pixels, inputs=inputs, outputs=channels, kernel=9),
                "time": Linear(positions=1, inputs=time, outputs=channels),
                "add_time": Residual(positions=pixels, features=channels, axis="col"),
                "norm2": GroupNorm(groups=model.groups, segments=(channels,), axis="col", positions=pixels),
                "silu2": Activation(kind="silu", positions=pixels, features=channels, axis="col"),
            }
            if model.dropout:
                parts["dropout"] = Dropout(positions=pixels, features=channels, axis="col")
            parts["conv2"] = Linear(positions=pixels, inputs=channels, outputs=channels, kernel=9, layout=TRANSPOSED)
            if link.shortcut:
                parts["shortcut"] = Linear(positions=pixels, inputs=inputs, outputs=channels, image=True)
                parts["relayout"] = across
            parts["residual"] = Residual(positions=pixels, features=channels)
            return parts
        case "attention":
            return {
                "norm": norm,
                "in_proj": Linear(positions=pixels, inputs=channels, outputs=3 * channels),
                "core": AttentionCore(
                    positions=pixels, heads=channels // model.head_channels, width=model.head_channels, causal=False
                ),
                "out_proj": Linear(positions=pixels, inputs=channels, outputs=channels, layout=TRANSPOSED),
                "residual": Residual(positions=pixels, features=channels),
            }
        case "down":
            conv = Linear(positions=pixels, inputs=inputs, outputs=channels, kernel=9, input_positions=4 * pixels)
            return {"conv": conv, "relayout": across}
        case "up":
            small = Relayout(elements=channels * (pixels // 4), source="row", target="col")
            read = inputs * (pixels // 4)
            larger = Rearranged(kind="upsample", positions=pixels, features=inputs, inputs=read, axis="col")
            conv = Linear(positions=pixels, inputs=inputs, outputs=channels, kernel=9, layout=TRANSPOSED)
            return {"relayout": small, "upsample": larger, "conv": conv}
        case "output":
            conv = Linear(positions=pixels, inputs=inputs, outputs=channels, kernel=9, layout=("row", None))
            silu = Activation(kind="silu", positions=pixels, features=inputs, axis="row")
            return {"norm": norm, "silu": silu, "conv": conv}
