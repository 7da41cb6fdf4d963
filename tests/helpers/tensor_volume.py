"""Closed form of the tensor-parallel volume, and the grid that minimises it (Singh & Bhatele, arXiv 2305.13525).

A linear layer all-reduces its output along one tensor axis and its input's gradient along the other. Over rings, with m
rows in the whole batch on G = G_data G_row G_col ranks, a rank sends 2 (m/G) [(G_row - 1) out + (G_col - 1) in]
elements (row and col swapped in a transposed layer). Summed over the layers of a model, a rank sends per row of the
batch 2/G [(G_row - 1) a + (G_col - 1) b] elements, where a and b are the *widths* of the model. For given G_tensor this
is minimal at G_col = sqrt(a/b G_tensor). The layers of a transformer without recomputation have a = 12 hidden and
b = 4 hidden, so the minimum is at sqrt(3 G_tensor).

The reference for `axonn.perf.timing.communication`, which the product uses, and for published grids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from typing import NamedTuple

from axonn.grid import ProcessGrid
from axonn.perf.layers.layer_cost import EmbeddingCost, LayerCost, LinearCost, TensorAxis
from axonn.perf.layers.model_outline import ModelOutline


class Widths(NamedTuple):
    """Elements of one row of the batch, before anything is cut, that are all-reduced along each axis in a step."""

    row: float
    col: float

    def sent(self, grid: ProcessGrid, batch_size: float) -> float:
        """Return the elements that one rank sends in a step, over rings."""
        return 2 * batch_size / grid.size * ((grid.row - 1) * self.row + (grid.col - 1) * self.col)

    def best_col(self, tensor: int) -> float:
        """Return the real G_col that minimises the volume for this G_tensor."""
        return sqrt(self.row * tensor / self.col) if self.col else float(tensor)


def widths_of(outline: ModelOutline, *, recompute: bool = False) -> Widths:
    """Return the widths of the matrix products, convolutions and embeddings of a model, over all stages.

    With `recompute` the forward of the blocks runs twice. Norms, redistributions and the loss are left out; they send
    little.
    """
    total = {"row": 0, "col": 0}
    for link in outline.links:
        forwards = 2 if recompute and link.block is not None else 1
        for layer in link.parts.values():
            for axis, elements in _reduced(layer, forwards):
                if axis is not None:
                    total[axis] += elements
    return Widths(total["row"], total["col"])


def _reduced(layer: LayerCost, forwards: int) -> list[tuple[TensorAxis | None, int]]:
    """Return the elements of one row that a layer all-reduces, each with the axis."""
    if isinstance(layer, EmbeddingCost):
        return [(layer.layout[0], forwards * layer.positions * layer.features)]
    if not isinstance(layer, LinearCost):
        return []
    backwards = (layer.input_positions or layer.positions) * layer.inputs if layer.input_gradient else 0
    return [(layer.layout[0], forwards * layer.positions * layer.outputs), (layer.layout[1], backwards)]


def neighbours(ideal: float, tensor: int) -> tuple[int, ...]:
    """Return the divisors of `tensor` next to `ideal`, below and above; one if they are equal or only one exists."""
    divisors = [n for n in range(1, tensor + 1) if tensor % n == 0]
    below = [n for n in divisors if n <= ideal]
    above = [n for n in divisors if n >= ideal]
    return tuple(sorted({*below[-1:], *above[:1]}))


def best_tensor_grid(widths: Widths, tensor: int) -> tuple[int, int]:
    """Return the (G_row, G_col) with product `tensor` that minimises the volume, in closed form.

    The volume is convex in G_col, so the best divisor is next to sqrt(a/b G_tensor), on either side. Of equally good
    ones it is the larger G_col, with fewer rows to gather moments along.
    """
    candidates = [(tensor // col, col) for col in neighbours(widths.best_col(tensor), tensor)]
    return min(candidates, key=lambda c: (c[0] * widths.row + c[1] * widths.col, -c[1]))


def factorisations(ranks: int) -> Iterator[ProcessGrid]:
    """Yield every grid of `ranks` ranks with one stage."""
    for data in range(1, ranks + 1):
        for row in range(1, ranks // data + 1):
            if ranks % (data * row) == 0:
                yield ProcessGrid(data=data, row=row, col=ranks // (data * row))


def best_by_trying(grids: Sequence[ProcessGrid], sent: Callable[[ProcessGrid], float]) -> ProcessGrid:
    """Return the grid with the least volume `sent`; of equally good ones the one with the largest G_col."""
    return min(grids, key=lambda grid: (sent(grid), -grid.col))
