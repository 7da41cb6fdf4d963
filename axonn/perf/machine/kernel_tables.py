"""Measured kernel times of a device, tabulated on regular grids of sizes and interpolated.

Between grid points the logarithm of the time is interpolated linearly in the logarithms of the sizes. Beyond the
largest size of an axis the rate is constant; below the smallest the time is, because the overhead of a small kernel
does not depend on its size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise, product
from math import exp, log, prod
from typing import Any, ClassVar, Literal

from pydantic import Field

from axonn.config.loading import StrictModel
from axonn.config.train_config import FloatType
from axonn.perf.layers.kernel_operations import (
    AttentionKernel,
    Convolution,
    MemoryBoundKernel,
    Operation,
    Product,
    Role,
    StreamKind,
)


class KernelTable(StrictModel):
    """Microseconds by sizes: `us` has one value per grid point, the last axis varying fastest."""

    axes: ClassVar[tuple[str, ...]]
    powers: ClassVar[tuple[int, ...]]
    """Exponent with which the work grows along each axis."""
    us: list[float]

    def model_post_init(self, context: Any) -> None:
        for name, sizes in zip(self.axes, self._sizes, strict=True):
            if not sizes or sizes[0] < 1 or any(b <= a for a, b in pairwise(sizes)):
                raise ValueError(f"{name} must list sizes from 1 on, each larger than the one before; found {sizes}")
        points = prod(map(len, self._sizes))
        if len(self.us) != points:
            raise ValueError(f"us has {len(self.us)} numbers, the grid of {', '.join(self.axes)} has {points} points")
        for value in self.us:
            if not 0 < value < 1e12:
                raise ValueError(f"us has {value}: a time in microseconds must be positive; measure that point again")

    @property
    def _sizes(self) -> list[list[int]]:
        return [getattr(self, name) for name in self.axes]

    @property
    def points(self) -> list[tuple[tuple[int, ...], float]]:
        """(sizes, seconds) of every grid point."""
        return [(sizes, us * 1e-6) for sizes, us in zip(product(*self._sizes), self.us, strict=True)]

    def at(self, *sizes: float) -> float:
        """Return the seconds at these sizes, given in the order of `axes`."""
        past = 1.0
        corners: list[tuple[int, float]] = [(0, 1.0)]
        for size, grid, power in zip(sizes, self._sizes, self.powers, strict=True):
            if size > grid[-1]:
                past *= (size / grid[-1]) ** power
            low, share = _place(size, grid)
            corners = [
                (index * len(grid) + low + step, weight * part)
                for index, weight in corners
                for step, part in ((0, 1.0 - share), (1, share))
                if part > 0
            ]
        return past * 1e-6 * exp(sum(weight * log(self.us[index]) for index, weight in corners))


def _place(size: float, grid: Sequence[int]) -> tuple[int, float]:
    """Return (index of the grid point below, fraction of the way to the next one), clamped to the grid."""
    if size <= grid[0]:
        return 0, 0.0
    if size >= grid[-1]:
        return len(grid) - 1, 0.0
    low = bisect_right(grid, size) - 1
    return low, log(size / grid[low]) / log(grid[low + 1] / grid[low])


class ProductTable(KernelTable):
    """Times of products of [m, k] and [k, n], in one role of a linear layer."""

    axes = ("m", "n", "k")
    powers = (1, 1, 1)
    m: list[int]
    n: list[int]
    k: list[int]


class ConvolutionTable(KernelTable):
    """Times of convolutions of stride 1 that keep the size, in one role; other strides have the same rate.

    `size`: side of the image in pixels. `kernel`: side of the kernel in weights.
    """

    axes = ("images", "inputs", "outputs", "size", "kernel")
    powers = (1, 1, 1, 2, 2)
    images: list[int]
    inputs: list[int]
    outputs: list[int]
    size: list[int]
    kernel: list[int]


class AttentionTable(KernelTable):
    """Times of fused attention without dropout: `matrices` of [rows, width]."""

    axes = ("matrices", "rows", "width")
    powers = (1, 2, 1)
    matrices: list[int]
    rows: list[int]
    width: list[int]


class StreamTable(KernelTable):
    """Times of memory-bound kernels of one kind, by the elements of the tensor that they work on."""

    axes = ("elements",)
    powers = (1,)
    elements: list[int]


AttentionVariant = Literal["forward", "backward", "causal-forward", "causal-backward"]
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class MeasuredKernels(StrictModel):
    """Kernels that `axonn calibrate` measured with `busy` devices of a node computing at the same time.

    `precision`: compute type. A measured forward product includes adding the bias; a weight gradient includes its
    accumulation. Convolutions, attention and streams without a table are computed by formula, from products and
    bandwidth.
    """

    busy: int = Field(ge=1)
    precision: FloatType
    source: str
    status: Literal["measured"] = "measured"
    products: dict[Role, ProductTable]
    convolutions: dict[Role, ConvolutionTable] = {}
    attention: dict[AttentionVariant, AttentionTable] = {}
    streams: dict[StreamKind, StreamTable] = {}

    def model_post_init(self, context: Any) -> None:
        for name, known in (("products", self.products), ("convolutions", self.convolutions)):
            missing = {"forward", "input", "weight"} - set(known)
            if missing and (known or name == "products"):
                raise ValueError(f"{name} lack the role {', '.join(sorted(missing))}; measure all three")

    @property
    def element(self) -> int:
        """Bytes per element."""
        return _BYTES[self.precision]

    @property
    def best_rate(self) -> float:
        """Highest FLOP/s that any product reached."""
        return max(2 * prod(sizes) / seconds for table in self.products.values() for sizes, seconds in table.points)

    def seconds(self, operation: Operation) -> float | None:
        """Return the seconds of one operation, or None if it was not measured."""
        match operation:
            case Product(m, n, k, batch, role):
                return batch * self.products[role].at(m, n, k)
            case Convolution() if self.convolutions:
                c = operation
                return self.convolutions[c.role].at(c.images, c.inputs, c.outputs, c.size, c.kernel)
            case AttentionKernel(matrices, rows, width, causal, False, backward):
                variant: AttentionVariant = "backward" if backward else "forward"
                if causal:
                    variant = "causal-backward" if backward else "causal-forward"
                return self.attention[variant].at(matrices, rows, width) if variant in self.attention else None
            case MemoryBoundKernel("bias"):
                return 0.0
            case MemoryBoundKernel(kind, elements) if kind in self.streams:
                return self.streams[kind].at(elements)
            case _:
                return None
