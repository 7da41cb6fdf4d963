"""Outlines of models for the performance model: the chain that is cut into stages, with the cost of every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.perf.layers.layer_cost import EmbeddingCost, LayerCost, LinearCost, NormCost
from axonn.perf.layers.local_layers import ActivationCost, AttentionCoreCost, DropoutCost, ResidualCost


@dataclass(frozen=True, kw_only=True)
class OutlineLink:
    """A link of the chain that inter-layer parallelism cuts. `parts`: its layers by name, in execution order.

    `block`: number of the block that it belongs to, the unit of activation checkpointing; None outside of blocks.
    `handed_on`: elements that it passes to the next link per row of the batch; all of them are cut along row. `cost`:
    forward work of one row in FLOPs, by which the chain is partitioned into stages.
    """

    name: str
    parts: Mapping[str, LayerCost]
    block: int | None = None
    handed_on: int = 0
    cost: float = 0.0

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        """Return the elements of each parameter on one rank, by full name."""
        return {
            f"{self.name}.{layer_name}.{parameter}": elements
            for layer_name, layer in self.parts.items()
            for parameter, elements in layer.parameters(grid).items()
        }

    def message(self, grid: ProcessGrid, rows: int) -> int:
        """Return the elements that a rank passes to the next link for `rows` rows."""
        return rows * self.handed_on // grid.row


@dataclass(frozen=True, kw_only=True)
class ModelOutline:
    """A model: its chain, its loss, and the pairs of full names that share one parameter (`ties`).

    `flops`, `flops_recomputing`: of training on one row, without and with activation checkpointing.
    """

    links: Sequence[OutlineLink]
    loss: LayerCost
    ties: Sequence[tuple[str, str]] = field(default=())
    name: str = "model"
    flops: float = 0.0
    flops_recomputing: float = 0.0

    def parameters(self, spans: Iterable[range], grid: ProcessGrid) -> dict[str, int]:
        """Return the elements of each parameter on a rank that holds the links `spans`, by full name.

        Tied parameters count once, under their first name.
        """
        first_name = {second: first for first, second in self.ties}
        parameters: dict[str, int] = {}
        for span in spans:
            for i in span:
                for name, elements in self.links[i].parameters(grid).items():
                    parameters[first_name.get(name, name)] = elements
        return parameters


def with_sequence_parallelism(outline: ModelOutline) -> ModelOutline:
    """Return the model with the positions of the residual stream cut along col, on which its features are replicated.

    Korthikanti et al., arXiv 2205.05198, section 4.2.2. Raises `ConfigError` for layers that mix positions.
    """
    layers = {layer for link in outline.links for layer in link.parts.values()}
    spread = {layer: _spread(layer, outline.name) for layer in layers}
    links = [replace(link, parts={name: spread[layer] for name, layer in link.parts.items()}) for link in outline.links]
    return replace(outline, links=links)


def _spread(layer: LayerCost, model: str) -> LayerCost:
    match layer:
        case LinearCost(kernel=1, layout=("row", "col")):
            return replace(layer, spread="input")
        case LinearCost(kernel=1, layout=("col", "row")):
            return replace(layer, spread="output")
        case NormCost() | ResidualCost() | DropoutCost():
            return replace(layer, spread="col") if layer.axis == "row" else layer
        case EmbeddingCost():
            return replace(layer, spread="col") if layer.layout[0] == "col" else layer
        case AttentionCoreCost() | ActivationCost():
            return layer
        case _:
            raise ConfigError(
                f"sequence parallelism is for chains of transformer layers; {model} has a {type(layer).__name__}: "
                "set sequence_parallel to false"
            )
