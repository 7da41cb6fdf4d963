"""What one rank computes for a layer, as operations, and what it keeps in memory for the backward.

Sizes only; `axonn.perf.machine.kernel_times` gives them times. A transformer layer is what Megatron-LM runs in half precision
(Narayanan et al., SC 2021, section 4.2): bias and GELU, bias, dropout and residual, scale, mask and softmax are one
kernel each. `axonn.perf.layers.layer_cost` has the same layers' communication.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import NamedTuple

from axonn.grid import ProcessGrid
from axonn.perf.layers.kernel_operations import (
    AttentionKernel,
    Convolution,
    MemoryBoundKernel,
    Operation,
    Product,
    Role,
    StreamKind,
)
from axonn.perf.layers.layer_cost import (
    CrossEntropyCost,
    EmbeddingCost,
    GroupNormCost,
    Issued,
    LayerCost,
    LinearCost,
    NormCost,
    RedistributionCost,
    TensorAxis,
)
from axonn.perf.layers.local_layers import (
    ActivationCost,
    AttentionCoreCost,
    DropoutCost,
    RearrangementCost,
    ResidualCost,
    WholeLossCost,
)

VOCABULARY_UNIT = 128
"""What the ranks cannot share evenly (a vocabulary) is padded to multiples of this, as Megatron-LM does."""


class Saved(NamedTuple):
    """What is kept from forward to backward: elements of the compute type, of single precision, and bytes of masks."""

    elements: int = 0
    wide: int = 0
    mask: int = 0

    def bytes(self, element: int) -> int:
        """Bytes, an element of the compute type having `element`."""
        return element * self.elements + 4 * self.wide + self.mask


class LayerWork(NamedTuple):
    """One layer on one rank. `weight`: the part of the backward that only gives gradients of parameters."""

    forward: tuple[Operation, ...] = ()
    backward: tuple[Operation, ...] = ()
    weight: tuple[Operation, ...] = ()
    saved: Saved = Saved()


@lru_cache(maxsize=1 << 16)
def work_of(part: LayerCost, grid: ProcessGrid, rows: int) -> LayerWork:
    """What a rank of `grid` computes for `rows` rows of the batch."""
    match part:
        case LinearCost():
            return _linear(part, grid, rows)
        case AttentionCoreCost():
            return _attention(part, grid, rows)
        case EmbeddingCost():
            return _embedding(part, grid, rows)
        case NormCost():
            elements = part.places(grid, rows) * _share(grid, part.features, part.axis)
            return _norm("layer-norm", elements, trained=part.weight or part.bias)
        case GroupNormCost():
            elements = rows * part.positions * _share(grid, sum(part.segments), part.axis)
            return _norm("group-norm", elements, trained=part.affine)
        case ActivationCost():
            elements = rows * part.positions * _share(grid, part.features, part.axis)
            backward = MemoryBoundKernel(_backward(part.kind), elements, 3 * elements)
            return LayerWork(
                (MemoryBoundKernel(part.kind, elements, 2 * elements),), (backward,), saved=Saved(elements)
            )
        case ResidualCost():
            return _residual(part.places(grid, rows) * _share(grid, part.features, part.axis), part.dropout)
        case DropoutCost():
            elements = part.places(grid, rows) * _share(grid, part.features, part.axis)
            forward = MemoryBoundKernel("dropout", elements, 2 * elements, mask=elements)
            back = forward._replace(kind="dropout-backward")
            return LayerWork((forward,), (back,), saved=Saved(mask=elements))
        case RearrangementCost():
            elements = rows * part.positions * _share(grid, part.features, part.axis)
            moved = elements + rows * _share(grid, part.inputs, part.axis)
            forward = MemoryBoundKernel(part.kind, elements, moved)
            return LayerWork((forward,), (MemoryBoundKernel(_backward(part.kind), elements, moved),))
        case RedistributionCost():
            # Cut or copied into place on the way to the collective and from it.
            elements = rows * _share(grid, part.elements, part.source)
            copied = () if grid.tensor == 1 else (MemoryBoundKernel("transpose", elements, 4 * elements),)
            return LayerWork(copied, copied)
        case Issued():
            return LayerWork()
        case CrossEntropyCost():
            return _cross_entropy(part, grid, rows)
        case WholeLossCost():
            elements = rows * part.elements
            loss = MemoryBoundKernel("cross-entropy", elements, 0, wide=3 * elements)
            return LayerWork((loss,), (loss,), saved=Saved(wide=elements))
        case _:
            raise TypeError(f"{type(part).__name__} is no layer whose work is known")


def _backward(kind: StreamKind) -> StreamKind:
    return f"{kind}-backward"  # type: ignore[return-value]


def _share(grid: ProcessGrid, size: int, axis: TensorAxis | None) -> int:
    """Of `size` features, those of the rank that has most of them."""
    extent = 1 if axis is None else grid.extent(axis)
    share, rest = divmod(size, extent)
    return VOCABULARY_UNIT * -(-(share + 1) // VOCABULARY_UNIT) if rest else share


def _linear(part: LinearCost, grid: ProcessGrid, rows: int) -> LayerWork:
    inputs, outputs = _share(grid, part.inputs, part.layout[0]), _share(grid, part.outputs, part.layout[1])
    places = rows * part.positions
    read = rows * (part.input_positions or part.positions) * inputs
    kept = -(-read // grid.extent(part.layout[1])) if part.spread == "input" and part.layout[1] else read

    def product(role: Role) -> Operation:
        if part.image or part.kernel > 1:
            side = isqrt(part.kernel)
            size = isqrt(part.positions)
            stride = isqrt((part.input_positions or part.positions) // part.positions)
            return Convolution(rows, inputs, outputs, size, side, max(1, stride), role)
        m, n, k = {
            "forward": (places, outputs, inputs),
            "input": (places, inputs, outputs),
            "weight": (outputs, inputs, places),
        }[role]
        return Product(m, n, k, role=role)

    made = places * outputs
    forward = [product("forward")]
    parameters = outputs * inputs * part.kernel
    weight = [product("weight"), MemoryBoundKernel("accumulate", parameters, 3 * parameters)]
    if part.bias:
        if not part.fused_bias:
            forward.append(MemoryBoundKernel("bias", made, 2 * made))
        weight.append(MemoryBoundKernel("bias-backward", made, made))
    backward = [product("input")] if part.input_gradient else []
    return LayerWork(tuple(forward), tuple(backward), tuple(weight), Saved(kept))


def _attention(part: AttentionCoreCost, grid: ProcessGrid, rows: int) -> LayerWork:
    heads = max(1, part.heads // grid.col)
    matrices = rows * heads
    elements = matrices * part.positions * part.width
    scores = matrices * part.positions**2

    def operation(backward: bool) -> Operation:
        return AttentionKernel(matrices, part.positions, part.width, part.causal, part.dropout, backward)

    # Heads go back into rows; backward, and gradients of q, k and v into one tensor.
    forward = (operation(False), MemoryBoundKernel("transpose", elements, 2 * elements))
    backward = (operation(True), MemoryBoundKernel("transpose", 4 * elements, 8 * elements))
    # Probabilities, and with dropout what is left of them and the mask; q, k and v are a view of what they came from.
    saved = Saved(scores + (scores if part.dropout else 0) + 3 * elements, mask=scores if part.dropout else 0)
    return LayerWork(forward, backward, saved=saved)


def _embedding(part: EmbeddingCost, grid: ProcessGrid, rows: int) -> LayerWork:
    entries, features = _share(grid, part.entries, part.layout[0]), _share(grid, part.features, part.layout[1])
    elements = rows * part.positions * features
    table = entries * features
    forward = MemoryBoundKernel("embedding", elements, 3 * elements)
    # The table's gradient is cleared, rows are added to it, and it is accumulated like any weight's.
    gradient = MemoryBoundKernel("embedding-backward", elements, 3 * elements + table, kernels=2)
    accumulate = MemoryBoundKernel("accumulate", table, 3 * table)
    return LayerWork((forward,), (), (gradient, accumulate), Saved())


def _norm(kind: StreamKind, elements: int, *, trained: bool) -> LayerWork:
    forward = MemoryBoundKernel(kind, elements, 2 * elements)
    # Gradient and input in, gradient out; once more for the gradients of scale and shift.
    moved, kernels = (5, 2) if trained else (3, 1)
    backward = MemoryBoundKernel(_backward(kind), elements, moved * elements, kernels=kernels)
    return LayerWork((forward,), (backward,), saved=Saved(elements))


def _residual(elements: int, dropout: bool) -> LayerWork:
    mask = elements if dropout else 0
    forward = MemoryBoundKernel("residual", elements, 3 * elements, mask=mask)
    back = [MemoryBoundKernel("residual-backward", elements, 3 * elements)]
    if dropout:
        back.append(MemoryBoundKernel("dropout-backward", elements, 2 * elements, mask=mask))
    return LayerWork((forward,), tuple(back), saved=Saved(mask=mask))


def _cross_entropy(part: CrossEntropyCost, grid: ProcessGrid, rows: int) -> LayerWork:
    """In single precision: to it (read, write), largest, minus it and exponential (read, write), sum; back, softmax and
    its gradient (read and write each), to the compute type (read, write)."""
    logits = rows * part.positions * _share(grid, part.entries, part.axis)
    forward = MemoryBoundKernel("cross-entropy", logits, logits, wide=5 * logits, kernels=4)
    backward = MemoryBoundKernel("cross-entropy-backward", logits, logits, wide=5 * logits, kernels=3)
    return LayerWork((forward,), (backward,), saved=Saved(logits, wide=logits))
