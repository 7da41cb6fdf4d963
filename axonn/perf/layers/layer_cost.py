"""Communication cost of layers: the collectives that each issues, and the sizes of its parameters on one rank.

Derived from the definition of the two-dimensional layers (Singh & Bhatele, arXiv 2305.13525), independently of
`axonn.tensor`, with which it shares no code. Sizes are exact and per rank. `rows`: rows of the batch, sequences or
images. `positions`: tokens or pixels of one row. A *place* is one position of one row.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from axonn.grid import ProcessGrid

TensorAxis = Literal["row", "col"]
Kind = Literal["all-reduce sum", "all-reduce max", "all-gather", "reduce-scatter"]
When = Literal["before", "beside", "after"]
Layout = tuple[TensorAxis | None, TensorAxis | None]
"""Axes along which the features of a layer's input and output are cut."""
NORMAL: Layout = ("row", "col")
TRANSPOSED: Layout = ("col", "row")


class Exchange(NamedTuple):
    """A collective along a tensor axis. `wide`: in float32 or wider instead of the compute type."""

    kind: Kind
    axis: TensorAxis
    elements: int
    """Elements that a rank contributes."""
    wide: bool = False
    when: When = "after"
    """Before or after the layer's computation; beside: alongside the first product of the backward."""


class LayerCost(Hashable, Protocol):
    """One layer. Equal layers have equal cost."""

    @property
    def saves(self) -> bool:
        """True if its forward saves a tensor for its backward."""
        ...

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        """Return the collectives that a rank issues in the forward of `rows` rows."""
        ...

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        """Return the collectives that a rank issues in the backward of `rows` rows."""
        ...

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        """Return the elements of each parameter on one rank."""
        ...


def _share(grid: ProcessGrid, size: int, axis: TensorAxis | None) -> int:
    return size if axis is None else size // grid.extent(axis)


def places_of(grid: ProcessGrid, rows: int, positions: int, spread: TensorAxis | None) -> int:
    """Return the places of `rows` rows on the rank with the most of them, the positions being cut along `spread`."""
    return rows * (positions if spread is None else -(-positions // grid.extent(spread)))


def _exchanges(
    grid: ProcessGrid,
    kind: Kind,
    axis: TensorAxis | None,
    elements: int,
    *,
    wide: bool = False,
    when: When = "after",
) -> list[Exchange]:
    """Return one collective, or none if the axis has a single rank."""
    return [] if axis is None or grid.extent(axis) == 1 else [Exchange(kind, axis, elements, wide, when)]


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A layer whose input is saved for its backward."""

    @property
    def saves(self) -> bool:
        """Always true: the input is saved for the backward."""
        return True


@dataclass(frozen=True, kw_only=True)
class LinearCost(Saving):
    """A linear layer applied to `positions` tokens of each row, or a convolution whose output has `positions` pixels.

    The output is all-reduced along the axis of the input; the input's gradient, if it is needed (`input_gradient`),
    along the axis of the output. `kernel`: weights per pair of input and output features. `input_positions`: positions
    of the input, if they differ from those of the output.
    `spread`: sequence parallelism (Korthikanti et al., arXiv 2205.05198, section 4.2.2): the side, input or output,
    whose positions are cut along the axis on which its features are replicated. A spread input is all-gathered before
    the product, and again for the weight's gradient, so that only the shard is saved; all-reduces become
    reduce-scatters.
    """

    positions: int
    inputs: int
    outputs: int
    layout: Layout = NORMAL
    bias: bool = True
    input_gradient: bool = True
    kernel: int = 1
    input_positions: int | None = None
    fused_bias: bool = False
    """True if the next kernel adds the bias."""
    image: bool = False
    """True for a 1x1 convolution of an image; with `kernel` above 1 a layer is a convolution in any case."""
    spread: Literal["input", "output"] | None = None

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        input_axis, output_axis = self.layout
        elements = rows * self.positions * _share(grid, self.outputs, output_axis)
        if self.spread == "output":
            return _exchanges(grid, "reduce-scatter", input_axis, elements)
        reduced = _exchanges(grid, "all-reduce sum", input_axis, elements)
        if self.spread is None:
            return reduced
        return [
            *_exchanges(grid, "all-gather", output_axis, self._spread_elements(grid, rows), when="before"),
            *reduced,
        ]

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        if not self.input_gradient:
            return []
        input_axis, output_axis = self.layout
        elements = rows * (self.input_positions or self.positions) * _share(grid, self.inputs, input_axis)
        if self.spread == "input":
            gathered = _exchanges(grid, "all-gather", output_axis, self._spread_elements(grid, rows), when="beside")
            return [*gathered, *_exchanges(grid, "reduce-scatter", output_axis, elements)]
        reduced = _exchanges(grid, "all-reduce sum", output_axis, elements)
        if self.spread is None:
            return reduced
        return [*_exchanges(grid, "all-gather", input_axis, self._spread_elements(grid, rows), when="before"), *reduced]

    def _spread_elements(self, grid: ProcessGrid, rows: int) -> int:
        """Return the elements on one rank of the side that is spread."""
        input_axis, output_axis = self.layout
        if self.spread == "output":
            return places_of(grid, rows, self.positions, input_axis) * _share(grid, self.outputs, output_axis)
        return places_of(grid, rows, self.positions, output_axis) * _share(grid, self.inputs, input_axis)

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        outputs = _share(grid, self.outputs, self.layout[1])
        weight = {"weight": outputs * _share(grid, self.inputs, self.layout[0]) * self.kernel}
        return weight | ({"bias": outputs} if self.bias else {})


@dataclass(frozen=True, kw_only=True)
class NormCost(Saving):
    """A norm over features cut along `axis`, at `positions` of each row.

    Each rank's mean and sum of squares are all-gathered; the backward all-reduces two means for the gradient.
    Without a mean (`centred=False`, an RMS norm) the squares are all-reduced, and the backward all-reduces one mean.
    `weight`, `bias`: whether it has these parameters. `spread`: axis along which the positions are cut.
    """

    positions: int
    features: int
    axis: TensorAxis | None = "row"
    spread: TensorAxis | None = None
    centred: bool = True
    weight: bool = True
    bias: bool = True

    def places(self, grid: ProcessGrid, rows: int) -> int:
        """Return the places on the rank with the most of them."""
        return places_of(grid, rows, self.positions, self.spread)

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        if not self.centred:
            return _exchanges(grid, "all-reduce sum", self.axis, self.places(grid, rows), wide=True)
        return _exchanges(grid, "all-gather", self.axis, 2 * self.places(grid, rows), wide=True)

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        moments = 2 if self.centred else 1
        return _exchanges(grid, "all-reduce sum", self.axis, moments * self.places(grid, rows), wide=True)

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        features = _share(grid, self.features, self.axis)
        return {name: features for name, has in (("weight", self.weight), ("bias", self.bias)) if has}


@dataclass(frozen=True, kw_only=True)
class EmbeddingCost(Saving):
    """A lookup among `entries`, cut along the first axis of `layout`, along which the output is all-reduced.

    The gradient of its output is complete, and its indices have none. `spread`: axis along which the positions of the
    output are cut; then each rank needs the gradient of all positions for its shard of the table.
    """

    positions: int
    entries: int
    features: int
    layout: Layout = TRANSPOSED
    spread: TensorAxis | None = None

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        elements = rows * self.positions * _share(grid, self.features, self.layout[1])
        return _exchanges(grid, "reduce-scatter" if self.spread else "all-reduce sum", self.layout[0], elements)

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        if self.spread is None:
            return []
        elements = places_of(grid, rows, self.positions, self.spread) * _share(grid, self.features, self.layout[1])
        return _exchanges(grid, "all-gather", self.layout[0], elements, when="before")

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        entries, features = _share(grid, self.entries, self.layout[0]), _share(grid, self.features, self.layout[1])
        return {"weight": entries * features}


@dataclass(frozen=True, kw_only=True)
class CrossEntropyCost(Saving):
    """Cross entropy over a vocabulary cut along `axis`.

    Largest logit, sum of exponentials and the target's logit are all-reduced. The backward needs no collective.
    """

    positions: int
    entries: int = 0
    """Size of the vocabulary."""
    axis: TensorAxis = "col"

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        places = rows * self.positions
        return [
            *_exchanges(grid, "all-reduce max", self.axis, places, wide=True),
            *_exchanges(grid, "all-reduce sum", self.axis, 2 * places, wide=True),
        ]

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return []

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        return {}


@dataclass(frozen=True, kw_only=True)
class GroupNormCost(Saving):
    """A group norm whose channels are cut along `axis`, each of `segments` by itself.

    Only groups that are spread over several ranks need collectives: their moments are all-gathered in the forward, and
    two sums all-reduced in the backward. `affine`: whether it has a weight and a bias.
    """

    groups: int
    segments: tuple[int, ...]
    axis: TensorAxis | None = "row"
    positions: int = 1
    affine: bool = True

    def crossing(self, extent: int) -> int:
        """Return the number of groups that are spread over several of `extent` ranks."""
        borders: list[tuple[int, int]] = []
        start = 0
        for segment in self.segments:
            borders += [(start + i * segment // extent, i) for i in range(extent)]
            start += segment
        size = start // self.groups
        ends = [*(first for first, _ in borders[1:]), start]
        holders: list[set[int]] = [set() for _ in range(self.groups)]
        for (first, rank), end in zip(borders, ends, strict=True):
            for group in range(first // size, -(-end // size)):
                holders[group].add(rank)
        return sum(len(ranks) > 1 for ranks in holders)

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return self._of_crossing(grid, rows, "all-gather")

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return self._of_crossing(grid, rows, "all-reduce sum")

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        channels = _share(grid, sum(self.segments), self.axis)
        return {"weight": channels, "bias": channels} if self.affine else {}

    def _of_crossing(self, grid: ProcessGrid, rows: int, kind: Kind) -> list[Exchange]:
        crossing = 0 if self.axis is None else self.crossing(grid.extent(self.axis))
        return _exchanges(grid, kind, self.axis, 2 * rows * crossing, wide=True) if crossing else []


@dataclass(frozen=True, kw_only=True)
class RedistributionCost:
    """Redistribution of a tensor from cut along `source` to cut along `target`, replicated along the other axis.

    The ranks along the source all-gather the tensor, or all-reduce the shard that they all need, to which each
    contributes what it holds; that is less when the target has more than two ranks. The gradient takes the way back.
    """

    elements: int
    """Elements of the full tensor per row."""
    source: TensorAxis
    target: TensorAxis

    @property
    def saves(self) -> bool:
        """Always false: nothing is saved for the backward."""
        return False

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return self._moved(grid, rows, self.source, self.target)

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return self._moved(grid, rows, self.target, self.source)

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        return {}

    def _moved(self, grid: ProcessGrid, rows: int, source: TensorAxis, target: TensorAxis) -> list[Exchange]:
        if grid.extent(target) > 2:
            return _exchanges(grid, "all-reduce sum", source, rows * _share(grid, self.elements, target))
        return _exchanges(grid, "all-gather", source, rows * _share(grid, self.elements, source))


@dataclass(frozen=True, kw_only=True)
class Issued:
    """Collectives that were observed for `rows` rows, on the grid on which they were observed."""

    rows: int
    of_forward: tuple[Exchange, ...]
    of_backward: tuple[Exchange, ...]

    @property
    def saves(self) -> bool:
        """Always false: nothing is saved for the backward."""
        return False

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return [e._replace(elements=e.elements * rows // self.rows) for e in self.of_forward]

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return [e._replace(elements=e.elements * rows // self.rows) for e in self.of_backward]

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        return {}
