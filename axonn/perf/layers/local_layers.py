"""Layers of which each rank computes its part alone: they issue no collective and have no parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from axonn.grid import ProcessGrid
from axonn.perf.layers.layer_cost import Exchange, Saving, TensorAxis, places_of


@dataclass(frozen=True, kw_only=True)
class _Local:
    """A layer of which each rank computes its part alone, without parameters."""

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return []

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return []

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        return {}


@dataclass(frozen=True, kw_only=True)
class AttentionCoreCost(_Local, Saving):
    """softmax(q k^T) v of `heads` heads, which are cut along col, over `positions` places; `width`: of one head."""

    positions: int
    heads: int
    width: int
    causal: bool
    dropout: bool = False


@dataclass(frozen=True, kw_only=True)
class ActivationCost(_Local, Saving):
    """A nonlinearity at `positions` places of each row, its `features` cut along `axis`."""

    kind: Literal["gelu", "silu"]
    positions: int
    features: int
    axis: TensorAxis | None


@dataclass(frozen=True, kw_only=True)
class ResidualCost(_Local):
    """What a branch hands on, after dropout if there is any, is added to what went around it."""

    positions: int
    features: int
    axis: TensorAxis | None = "row"
    dropout: bool = False
    spread: TensorAxis | None = None
    """Axis along which the positions are cut."""

    def places(self, grid: ProcessGrid, rows: int) -> int:
        """Of a rank."""
        return places_of(grid, rows, self.positions, self.spread)

    @property
    def saves(self) -> bool:
        return self.dropout


@dataclass(frozen=True, kw_only=True)
class DropoutCost(_Local, Saving):
    """Dropout by itself. `spread`: axis along which the positions are cut."""

    positions: int
    features: int
    axis: TensorAxis | None = "row"
    spread: TensorAxis | None = None

    def places(self, grid: ProcessGrid, rows: int) -> int:
        """Of a rank."""
        return places_of(grid, rows, self.positions, self.spread)


@dataclass(frozen=True, kw_only=True)
class RearrangementCost(_Local):
    """Values copied to other places: maps enlarged, or several tensors joined into one. `inputs`: elements read."""

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
    """A loss of an output that is whole on every rank, with `elements` for each row."""

    elements: int = 0
