"""Outlines of models for the performance model: the chain of links that stages are cut from, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.perf.layers.layer_cost import EmbeddingCost, LayerCost, LinearCost, NormCost
from axonn.perf.layers.local_layers import ActivationCost, AttentionCoreCost, DropoutCost, ResidualCost


@dataclass(frozen=True, kw_only=True)
class OutlineLink:
    """A link of the chain that inter-layer parallelism cuts: its layers by name, in the order in which they run.

    `block`: number of the block that it is part of, which activation checkpointing recomputes; None outside of blocks.
    `handed_on`: elements of what it hands to the next link, for one row; all of it is cut along row. `cost`: forward
    work of one row in FLOPs, by which stages are cut.
    """

    name: str
    parts: Mapping[str, LayerCost]
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
class ModelOutline:
    """A model: its chain, its loss, and the pairs of full names that are one parameter.

    `flops`, `flops_recomputing`: of training on one row, without and with activation checkpointing.
    """

    links: Sequence[OutlineLink]
    loss: LayerCost
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


def with_sequence_parallelism(outline: ModelOutline) -> ModelOutline:
    """The same model with the positions of the residual stream cut along col, where its features are repeated.

    Korthikanti et al., arXiv 2205.05198, section 4.2.2. Raises `ConfigError` for layers that mix positions.
    """
    parts = {part for link in outline.links for part in link.parts.values()}
    spread = {part: _spread(part, outline.name) for part in parts}
    links = [replace(link, parts={name: spread[part] for name, part in link.parts.items()}) for link in outline.links]
    return replace(outline, links=links)


def _spread(part: LayerCost, model: str) -> LayerCost:
    match part:
        case LinearCost(kernel=1, layout=("row", "col")):
            return replace(part, spread="input")
        case LinearCost(kernel=1, layout=("col", "row")):
            return replace(part, spread="output")
        case NormCost() | ResidualCost() | DropoutCost():
            return replace(part, spread="col") if part.axis == "row" else part
        case EmbeddingCost():
            return replace(part, spread="col") if part.layout[0] == "col" else part
        case AttentionCoreCost() | ActivationCost():
            return part
        case _:
            raise ConfigError(
                f"sequence parallelism is for chains of transformer layers; {model} has a {type(part).__name__}: "
                "set sequence_parallel to false"
            )
