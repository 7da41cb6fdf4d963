"""The tensor-parallel volume in closed form, and the grid that makes it least (Singh & Bhatele, arXiv 2305.13525).

A linear layer all-reduces its output along one tensor axis and its input's gradient along the other. Over rings, with m
rows in the whole batch on G = G_data G_row G_col ranks, a rank sends 2 (m/G) [(G_row - 1) out + (G_col - 1) in]
elements (row and col swapped in a transposed layer). Over all layers of a model that is, for each row of the batch,
2/G [(G_row - 1) a + (G_col - 1) b]: a and b, its *widths*, say everything about the model. For given G_tensor the sum
is least at G_col = sqrt(a/b G_tensor). The layers of a transformer without recomputation have a = 12 hidden and
b = 4 hidden, which makes it sqrt(3 G_tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from typing import NamedTuple

from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.perf.layers.layer_cost import EmbeddingCost, LayerCost, LinearCost, TensorAxis
from axonn.perf.layers.model_outline import ModelOutline


class Widths(NamedTuple):
    """Elements, of one row of the batch and before anything is cut, that are summed along each axis in a step."""

    row: float
    col: float

    def sent(self, grid: ProcessGrid, batch_size: float) -> float:
        """Elements that one rank sends in a step, over rings."""
        return 2 * batch_size / grid.size * ((grid.row - 1) * self.row + (grid.col - 1) * self.col)

    def best_col(self, tensor: int) -> float:
        """G_col at which, for this G_tensor, the least is sent if it could be any number."""
        return sqrt(self.row * tensor / self.col) if self.col else float(tensor)


def widths_of(outline: ModelOutline, *, recompute: bool = False) -> Widths:
    """Of the matrix products, convolutions and embeddings of a model, all stages together.

    With `recompute` the forward of the blocks runs twice. Norms, re-layouts and the loss, which move little, are left
    out: `axonn.perf.timing.communication` has them all.
    """
    total = {"row": 0, "col": 0}
    for link in outline.links:
        forwards = 2 if recompute and link.block is not None else 1
        for part in link.parts.values():
            for axis, elements in _summed(part, forwards):
                if axis is not None:
                    total[axis] += elements
    return Widths(total["row"], total["col"])


def _summed(part: LayerCost, forwards: int) -> list[tuple[TensorAxis | None, int]]:
    """Elements of one row that a layer sums, each with the axis along which."""
    if isinstance(part, EmbeddingCost):
        return [(part.layout[0], forwards * part.positions * part.features)]
    if not isinstance(part, LinearCost):
        return []
    backwards = (part.input_positions or part.positions) * part.inputs if part.input_gradient else 0
    return [(part.layout[0], forwards * part.positions * part.outputs), (part.layout[1], backwards)]


def linear_elements(*, rows: float, inputs: int, outputs: int, grid: ProcessGrid, transposed: bool = False) -> float:
    """Elements that one rank sends for one linear layer, forward and backward, with `rows` in the whole batch."""
    widths = Widths(inputs, outputs) if transposed else Widths(outputs, inputs)
    return widths.sent(grid, rows)


def neighbours(ideal: float, tensor: int) -> tuple[int, ...]:
    """The largest divisor of `tensor` that is not above `ideal`, and the smallest that is not below; one if they agree
    or there is but one."""
    divisors = [n for n in range(1, tensor + 1) if tensor % n == 0]
    below = [n for n in divisors if n <= ideal]
    above = [n for n in divisors if n >= ideal]
    return tuple(sorted({*below[-1:], *above[:1]}))


def best_tensor_grid(widths: Widths, tensor: int) -> tuple[int, int]:
    """(G_row, G_col) with product `tensor` whose volume is least, in closed form.

    The volume is convex in G_col, so the best divisor is next to sqrt(a/b G_tensor), on one side or the other. Of equal
    ones the larger G_col, with fewer rows to gather moments along.
    """
    if tensor < 1:
        raise ConfigError(f"G_tensor is {tensor}; it must be at least 1")
    candidates = [(tensor // col, col) for col in neighbours(widths.best_col(tensor), tensor)]
    return min(candidates, key=lambda c: (c[0] * widths.row + c[1] * widths.col, -c[1]))


def best_grid(widths: Widths, ranks: int, *, tensor_at_least: int = 1) -> ProcessGrid:
    """The grid of `ranks` ranks without stages whose tensor-parallel volume is least, in closed form.

    G_data is as large as memory allows, which `tensor_at_least` says: a rank must not hold more than that part of a
    layer. Raises `ConfigError` when there are fewer ranks.
    """
    fitting = [n for n in range(tensor_at_least, ranks + 1) if ranks % n == 0]
    if not fitting:
        raise ConfigError(f"{ranks} ranks cannot share a layer {tensor_at_least} ways; take more ranks")
    row, col = best_tensor_grid(widths, fitting[0])
    return ProcessGrid(data=ranks // fitting[0], row=row, col=col)


def factorisations(ranks: int) -> Iterator[ProcessGrid]:
    """Every grid of `ranks` ranks without stages."""
    for data in range(1, ranks + 1):
        for row in range(1, ranks // data + 1):
            if ranks % (data * row) == 0:
                yield ProcessGrid(data=data, row=row, col=ranks // (data * row))


def best_by_trying(grids: Sequence[ProcessGrid], sent: Callable[[ProcessGrid], float]) -> ProcessGrid:
    """The grid with the least volume `sent`, by computing all; of equal ones the one with the largest G_col."""
    return min(grids, key=lambda grid: (sent(grid), -grid.col))
