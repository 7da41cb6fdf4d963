"""Layers without communication: each rank computes its shard alone, and they have no parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from axonn.grid import ProcessGrid
from axonn.perf.layers.layer_cost import Exchange, Saving, TensorAxis, places_of


@dataclass(frozen=True, kw_only=True)
class _Local:
    """A layer without collectives and parameters."""

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return []

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return []

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        return {}


@dataclass(frozen=True, kw_only=True)
class AttentionCoreCost(_Local, Saving):
    """softmax(q k^T) v of `heads` heads, which are cut along col, over `positions`. `width`: of one head."""

    positions: int
    heads: int
    width: int
    causal: bool
    dropout: bool = False


@dataclass(frozen=True, kw_only=True)
class ActivationCost(_Local, Saving):
    """A nonlinearity at `positions` of each row, its `features` cut along `axis`."""

    kind: Literal["gelu", "silu"]
    positions: int
    features: int
    axis: TensorAxis | None


@dataclass(frozen=True, kw_only=True)
class ResidualCost(_Local):
    """Addition of a branch to the residual stream, after dropout if there is any."""

    positions: int
    features: int
    axis: TensorAxis | None = "row"
    dropout: bool = False
    spread: TensorAxis | None = None
    """Axis along which the positions are cut."""

    def places(self, grid: ProcessGrid, rows: int) -> int:
        """Return the places on the rank with the most of them."""
        return places_of(grid, rows, self.positions, self.spread)

    @property
    def saves(self) -> bool:
        return self.dropout


@dataclass(frozen=True, kw_only=True)
class DropoutCost(_Local, Saving):
    """Dropout as a kernel of its own. `spread`: axis along which the positions are cut."""

    positions: int
    features: int
    axis: TensorAxis | None = "row"
    spread: TensorAxis | None = None

    def places(self, grid: ProcessGrid, rows: int) -> int:
        """Return the places on the rank with the most of them."""
        return places_of(grid, rows, self.positions, self.spread)


@dataclass(frozen=True, kw_only=True)
class RearrangementCost(_Local):
    """Copies without arithmetic: up-sampling, or concatenation of several tensors. `inputs`: elements read per row."""

    kind: Literal["upsample", "concatenate"]
    positions: int
    features: int
    inputs: int
    axis: TensorAxis | None = "row"

    @property
    def saves(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class WholeLossCost(_Local, Saving):
    """Loss of an output that is replicated on every rank, with `elements` per row."""

    elements: int = 0
