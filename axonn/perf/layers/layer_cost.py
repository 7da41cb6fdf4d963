"""Layers as far as communication goes: which collectives each issues, and how large its parameters are on one rank.

Written from the definition of the two-dimensional layers (Singh & Bhatele, arXiv 2305.13525), not from their code, and
it shares none with it. Sizes are per rank and exact; `rows` counts rows of the batch (sequences, images).
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
"""Axes along which the features of a layer's input and of its output are cut."""
NORMAL: Layout = ("row", "col")
TRANSPOSED: Layout = ("col", "row")


class Exchange(NamedTuple):
    """A collective along a tensor axis. `wide`: in float32 at least, otherwise in the compute type."""

    kind: Kind
    axis: TensorAxis
    elements: int
    """That a rank contributes."""
    wide: bool = False
    when: When = "after"
    """Before or after the layer's computation; beside: the first of the products of the backward does not need it."""


class LayerCost(Hashable, Protocol):
    """One layer. Equal ones do and need the same."""

    @property
    def saves(self) -> bool:
        """Whether its backward needs a tensor of its forward, which is so kept when its forward is done."""
        ...

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        """What a rank issues in the forward of `rows` rows."""
        ...

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        """As `forward`, in the backward."""
        ...

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        """Elements of each parameter on one rank."""
        ...


def _share(grid: ProcessGrid, size: int, axis: TensorAxis | None) -> int:
    return size if axis is None else size // grid.extent(axis)


def places_of(grid: ProcessGrid, rows: int, positions: int, spread: TensorAxis | None) -> int:
    """Places of `rows` rows on the rank that has most of them, the positions being cut along `spread`."""
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
    """One exchange, or none where a single rank has everything."""
    return [] if axis is None or grid.extent(axis) == 1 else [Exchange(kind, axis, elements, wide, when)]


@dataclass(frozen=True, kw_only=True)
class Saving:
    @property
    def saves(self) -> bool:
        """Whether its input is kept for the backward."""
        return True


@dataclass(frozen=True, kw_only=True)
class LinearCost(Saving):
    """A linear layer whose output has `positions` places for each row, or a convolution, whose places are pixels.

    The output is summed along the axis of the input. Its gradient gives that of the input, a sum along the axis of the
    output, unless nobody asks for it (`input_gradient`). `kernel`: weights for each pair of features.
    `input_positions`: places of the input, where it has more than the output.
    `spread`: the side whose places are cut along the tensor axis along which its features are repeated (sequence
    parallelism, Korthikanti et al., arXiv 2205.05198, section 4.2.2). An input is gathered before the product, and once
    more for the weight's gradient, so that only a part is kept; what would be summed is summed and scattered.
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
    """Whether the kernel that follows adds the bias."""
    image: bool = False
    """Whether it convolves an image; with more than one weight for each pair of features it does in any case."""
    spread: Literal["input", "output"] | None = None

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        read, made = self.layout
        elements = rows * self.positions * _share(grid, self.outputs, made)
        if self.spread == "output":
            return _exchanges(grid, "reduce-scatter", read, elements)
        gathered = _exchanges(grid, "all-gather", made, self._spread_elements(grid, rows), when="before")
        return [*(gathered if self.spread == "input" else []), *_exchanges(grid, "all-reduce sum", read, elements)]

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        if not self.input_gradient:
            return []
        read, made = self.layout
        elements = rows * (self.input_positions or self.positions) * _share(grid, self.inputs, read)
        if self.spread == "input":
            gathered = _exchanges(grid, "all-gather", made, self._spread_elements(grid, rows), when="beside")
            return [*gathered, *_exchanges(grid, "reduce-scatter", made, elements)]
        gathered = _exchanges(grid, "all-gather", read, self._spread_elements(grid, rows), when="before")
        return [*(gathered if self.spread == "output" else []), *_exchanges(grid, "all-reduce sum", made, elements)]

    def _spread_elements(self, grid: ProcessGrid, rows: int) -> int:
        """Of the side that is spread."""
        read, made = self.layout
        if self.spread == "output":
            return places_of(grid, rows, self.positions, read) * _share(grid, self.outputs, made)
        return places_of(grid, rows, self.positions, made) * _share(grid, self.inputs, read)

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        outputs = _share(grid, self.outputs, self.layout[1])
        weight = {"weight": outputs * _share(grid, self.inputs, self.layout[0]) * self.kernel}
        return weight | ({"bias": outputs} if self.bias else {})


@dataclass(frozen=True, kw_only=True)
class NormCost(Saving):
    """A norm over features cut along `axis`, at `positions` places of each row.

    Each rank's mean and sum of squares are gathered; the backward sums the two means that the gradient needs. Without
    a mean (`centred=False`, an RMS norm) the squares are summed, and the backward sums one mean. `weight`, `bias`:
    whether it has these parameters. `spread`: axis along which the positions are cut.
    """

    positions: int
    features: int
    axis: TensorAxis | None = "row"
    spread: TensorAxis | None = None
    centred: bool = True
    weight: bool = True
    bias: bool = True

    def places(self, grid: ProcessGrid, rows: int) -> int:
        """Of a rank."""
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
    """A lookup among `entries`, cut along the first axis of `layout`; what other ranks hold is summed in.

    The gradient of its output is complete, and what it looks up has none. `spread`: axis along which the positions of
    the output are cut. The rank that looks up a part of the words needs the gradient of all positions.
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
    """The loss over a vocabulary cut along `axis`: the largest logit, then sum of exponentials and target's logit.

    A rank knows all that its part of the gradient needs.
    """

    positions: int
    entries: int = 0
    """Words of the vocabulary."""
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

    Only groups that lie on several ranks need others: their moments are gathered, and their two sums reduced.
    `affine`: whether it has a weight and a bias.
    """

    groups: int
    segments: tuple[int, ...]
    axis: TensorAxis | None = "row"
    positions: int = 1
    affine: bool = True

    def crossing(self, extent: int) -> int:
        """How many groups lie on several of `extent` ranks."""
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
    """What is cut along `source` and repeated along `target` is laid out the other way round; its gradient goes back.

    Ranks along the source gather the whole, or sum what each has of the part that they all want; the second is less
    when more than two parts are wanted.
    """

    elements: int
    """Of the whole, for one row."""
    source: TensorAxis
    target: TensorAxis

    @property
    def saves(self) -> bool:
        """Whether its input is kept for the backward."""
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
    """Collectives as they were found for `rows` rows, on the grid for which they were found."""

    rows: int
    of_forward: tuple[Exchange, ...]
    of_backward: tuple[Exchange, ...]

    @property
    def saves(self) -> bool:
        """Whether its input is kept for the backward."""
        return False

    def forward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return [e._replace(elements=e.elements * rows // self.rows) for e in self.of_forward]

    def backward(self, grid: ProcessGrid, rows: int) -> list[Exchange]:
        return [e._replace(elements=e.elements * rows // self.rows) for e in self.of_backward]

    def parameters(self, grid: ProcessGrid) -> dict[str, int]:
        return {}
