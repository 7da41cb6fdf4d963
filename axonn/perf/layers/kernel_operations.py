"""What a device executes, one kernel or a few at a time: sizes only, no times (those are `axonn.perf.machine.kernel_times`)."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Role = Literal["forward", "input", "weight"]
"""Of the three products of a linear layer or convolution: the output, and the gradients of the input and the weight."""


class Product(NamedTuple):
    """`batch` matrix products of [m, k] and [k, n]."""

    m: int
    n: int
    k: int
    batch: int = 1
    role: Role = "forward"

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.m * self.n * self.k


class Convolution(NamedTuple):
    """A square convolution: `images` x [`inputs`, size x stride, ...] -> [`outputs`, `size`, `size`]."""

    images: int
    inputs: int
    outputs: int
    size: int
    """Pixels of a side of the output."""
    kernel: int
    """Weights of a side."""
    stride: int = 1
    role: Role = "forward"

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
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
]
"""Of layers; steps of optimizers have the names of `axonn.optim.algorithms.registry.update_streams`."""


class MemoryBoundKernel(NamedTuple):
    """Kernels that compute little for what they move between memory and device.

    `elements`: of the tensor that they work on. Moved, read and written together: `moved` elements of the type that is
    computed in, `wide` of single precision, `mask` bytes.
    """

    kind: StreamKind | str
    elements: int
    moved: int
    wide: int = 0
    mask: int = 0
    kernels: int = 1

    def bytes(self, element: int) -> int:
        """Bytes moved, an element of the type that is computed in having `element` bytes."""
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
