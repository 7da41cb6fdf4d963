"""Operations of a device, each one kernel or a few: sizes only, no times (see `axonn.perf.machine.kernel_times`)."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Role = Literal["forward", "input", "weight"]
"""The three products of a linear layer or convolution: output, gradient of the input, gradient of the weight."""


class Product(NamedTuple):
    """`batch` matrix products of [m, k] and [k, n]."""

    m: int
    n: int
    k: int
    batch: int = 1
    role: Role = "forward"

    @property
    def flops(self) -> int:
        """Floating-point operations: multiplications and additions."""
        return 2 * self.batch * self.m * self.n * self.k


class Convolution(NamedTuple):
    """A square convolution: `images` x [`inputs`, size x stride, ...] -> [`outputs`, `size`, `size`]."""

    images: int
    inputs: int
    outputs: int
    size: int
    """Side of the output in pixels."""
    kernel: int
    """Side of the kernel in weights."""
    stride: int = 1
    role: Role = "forward"

    @property
    def flops(self) -> int:
        """Floating-point operations: multiplications and additions."""
        return 2 * self.images * self.inputs * self.outputs * (self.size * self.kernel) ** 2


StreamKind = Literal[
    "layer-norm",
    "layer-norm-backward",
    "group-norm",
    "group-norm-backward",
    "bias",
    "bias-backward",
    "gelu",
    "gelu-backward",
    "silu",
    "silu-backward",
    "residual",
    "residual-backward",
    "dropout",
    "dropout-backward",
    "softmax",
    "softmax-backward",
    "transpose",
    "embedding",
    "embedding-backward",
    "cross-entropy",
    "cross-entropy-backward",
    "upsample",
    "upsample-backward",
    "concatenate",
    "concatenate-backward",
    "accumulate",
    "adam",
    "adam-offloaded",
]


class MemoryBoundKernel(NamedTuple):
    """One or several kernels whose time is bound by memory traffic.

    `elements`: of the tensor that they work on. Traffic, reads plus writes: `moved` elements of the compute type,
    `wide` elements of single precision, `mask` bytes. `kernels`: number of kernels.
    """

    kind: StreamKind
    elements: int
    moved: int
    wide: int = 0
    mask: int = 0
    kernels: int = 1

    def bytes(self, element: int) -> int:
        """Return the bytes moved, given `element` bytes per element of the compute type."""
        return element * self.moved + 4 * self.wide + self.mask


class AttentionKernel(NamedTuple):
    """softmax(q k^T) v of `matrices` (sequences times heads) matrices [`rows`, `width`], or its gradients."""

    matrices: int
    rows: int
    width: int
    causal: bool
    dropout: bool
    backward: bool = False


Operation: TypeAlias = Product | Convolution | MemoryBoundKernel | AttentionKernel
