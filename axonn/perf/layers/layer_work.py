"""Work of a layer on one rank: its operations, and the activations that it saves for the backward.

Sizes only; `axonn.perf.machine.kernel_times` gives them times. A transformer layer is that of Megatron-LM in half
precision (Narayanan et al., SC 2021, section 4.2), with one kernel each for bias and GELU; for bias, dropout and
residual; for scale, mask and softmax. `axonn.perf.layers.layer_cost` has the communication of the same layers.
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
"""A size that the ranks cannot share evenly (a vocabulary) is padded to multiples of this, as in Megatron-LM."""


class Saved(NamedTuple):
    """Activations saved for the backward: elements of the compute type, of single precision, and bytes of masks."""

    elements: int = 0
    wide: int = 0
    mask: int = 0

    def bytes(self, element: int) -> int:
        """Return the bytes, given `element` bytes per element of the compute type."""
        return element * self.elements + 4 * self.wide + self.mask


class LayerWork(NamedTuple):
    """Work of one layer on one rank. `weight`: the part of the backward that computes only gradients of parameters."""

    forward: tuple[Operation, ...] = ()
    backward: tuple[Operation, ...] = ()
    weight: tuple[Operation, ...] = ()
    saved: Saved = Saved()


@lru_cache(maxsize=1 << 16)
def work_of(layer: LayerCost, grid: ProcessGrid, rows: int) -> LayerWork:
    """Return the work of `layer` on a rank of `grid` for `rows` rows of the batch."""
    match layer:
        case LinearCost():
            return _linear(layer, grid, rows)
        case AttentionCoreCost():
            return _attention(layer, grid, rows)
        case EmbeddingCost():
            return _embedding(layer, grid, rows)
        case NormCost():
            elements = layer.places(grid, rows) * _share(grid, layer.features, layer.axis)
            return _norm("layer-norm", elements, trained=layer.weight or layer.bias)
        case GroupNormCost():
            elements = rows * layer.positions * _share(grid, sum(layer.segments), layer.axis)
            return _norm("group-norm", elements, trained=layer.affine)
        case ActivationCost():
            elements = rows * layer.positions * _share(grid, layer.features, layer.axis)
            backward = MemoryBoundKernel(_backward(layer.kind), elements, 3 * elements)
            return LayerWork(
                (MemoryBoundKernel(layer.kind, elements, 2 * elements),), (backward,), saved=Saved(elements)
            )
        case ResidualCost():
            return _residual(layer.places(grid, rows) * _share(grid, layer.features, layer.axis), layer.dropout)
        case DropoutCost():
            elements = layer.places(grid, rows) * _share(grid, layer.features, layer.axis)
            forward = MemoryBoundKernel("dropout", elements, 2 * elements, mask=elements)
            back = forward._replace(kind="dropout-backward")
            return LayerWork((forward,), (back,), saved=Saved(mask=elements))
        case RearrangementCost():
            elements = rows * layer.positions * _share(grid, layer.features, layer.axis)
            moved = elements + rows * _share(grid, layer.inputs, layer.axis)
            forward = MemoryBoundKernel(layer.kind, elements, moved)
            return LayerWork((forward,), (MemoryBoundKernel(_backward(layer.kind), elements, moved),))
        case RedistributionCost():
            # Copied into contiguous memory before the collective, and into place after it.
            elements = rows * _share(grid, layer.elements, layer.source)
            copied = () if grid.tensor == 1 else (MemoryBoundKernel("transpose", elements, 4 * elements),)
            return LayerWork(copied, copied)
        case Issued():
            return LayerWork()
        case CrossEntropyCost():
            return _cross_entropy(layer, grid, rows)
        case WholeLossCost():
            elements = rows * layer.elements
            loss = MemoryBoundKernel("cross-entropy", elements, 0, wide=3 * elements)
            return LayerWork((loss,), (loss,), saved=Saved(wide=elements))
        case _:
            raise TypeError(f"{type(layer).__name__} is no layer whose work is known")


def _backward(kind: StreamKind) -> StreamKind:
    return f"{kind}-backward"  # type: ignore[return-value]


def _share(grid: ProcessGrid, size: int, axis: TensorAxis | None) -> int:
    """Return how many of `size` features the rank with the most of them has."""
    extent = 1 if axis is None else grid.extent(axis)
    share, rest = divmod(size, extent)
    return VOCABULARY_UNIT * -(-(share + 1) // VOCABULARY_UNIT) if rest else share


def _linear(layer: LinearCost, grid: ProcessGrid, rows: int) -> LayerWork:
    inputs, outputs = _share(grid, layer.inputs, layer.layout[0]), _share(grid, layer.outputs, layer.layout[1])
    places = rows * layer.positions
    input_elements = rows * (layer.input_positions or layer.positions) * inputs
    gathered_by = grid.extent(layer.layout[1]) if layer.spread == "input" and layer.layout[1] else 1
    saved = -(-input_elements // gathered_by)

    def product(role: Role) -> Operation:
        if layer.image or layer.kernel > 1:
            side = isqrt(layer.kernel)
            size = isqrt(layer.positions)
            stride = isqrt((layer.input_positions or layer.positions) // layer.positions)
            return Convolution(rows, inputs, outputs, size, side, max(1, stride), role)
        m, n, k = {
            "forward": (places, outputs, inputs),
            "input": (places, inputs, outputs),
            "weight": (outputs, inputs, places),
        }[role]
        return Product(m, n, k, role=role)

    output_elements = places * outputs
    forward = [product("forward")]
    parameters = outputs * inputs * layer.kernel
    weight = [product("weight"), MemoryBoundKernel("accumulate", parameters, 3 * parameters)]
    if layer.bias:
        if not layer.fused_bias:
            forward.append(MemoryBoundKernel("bias", output_elements, 2 * output_elements))
        weight.append(MemoryBoundKernel("bias-backward", output_elements, output_elements))
    backward = [product("input")] if layer.input_gradient else []
    return LayerWork(tuple(forward), tuple(backward), tuple(weight), Saved(saved))


def _attention(layer: AttentionCoreCost, grid: ProcessGrid, rows: int) -> LayerWork:
    heads = max(1, layer.heads // grid.col)
    matrices = rows * heads
    elements = matrices * layer.positions * layer.width
    scores = matrices * layer.positions**2

    def operation(backward: bool) -> Operation:
        return AttentionKernel(matrices, layer.positions, layer.width, layer.causal, layer.dropout, backward)

    # Heads are transposed back into rows; in the backward also the gradients of q, k and v into one tensor.
    forward = (operation(False), MemoryBoundKernel("transpose", elements, 2 * elements))
    backward = (operation(True), MemoryBoundKernel("transpose", 4 * elements, 8 * elements))
    # Probabilities, and with dropout their dropped-out copy and the mask; q, k and v are views of one saved tensor.
    saved = Saved(scores + (scores if layer.dropout else 0) + 3 * elements, mask=scores if layer.dropout else 0)
    return LayerWork(forward, backward, saved=saved)


def _embedding(layer: EmbeddingCost, grid: ProcessGrid, rows: int) -> LayerWork:
    entries, features = _share(grid, layer.entries, layer.layout[0]), _share(grid, layer.features, layer.layout[1])
    elements = rows * layer.positions * features
    table = entries * features
    forward = MemoryBoundKernel("embedding", elements, 3 * elements)
    # The table's gradient is cleared, rows are added to it, and it is accumulated like any weight's.
    gradient = MemoryBoundKernel("embedding-backward", elements, 3 * elements + table, kernels=2)
    accumulate = MemoryBoundKernel("accumulate", table, 3 * table)
    return LayerWork((forward,), (), (gradient, accumulate), Saved())


def _norm(kind: StreamKind, elements: int, *, trained: bool) -> LayerWork:
    forward = MemoryBoundKernel(kind, elements, 2 * elements)
    # Gradient and input in, gradient out; gradient and input in again for the gradients of scale and shift.
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


def _cross_entropy(layer: CrossEntropyCost, grid: ProcessGrid, rows: int) -> LayerWork:
    """Return the work of the cross entropy, in single precision.

    Forward: cast to it (read, write), maximum (read), exponential of the difference (read, write), sum (read).
    Backward: softmax and its gradient (read and write each), cast to the compute type (read, write).
    """
    logits = rows * layer.positions * _share(grid, layer.entries, layer.axis)
    forward = MemoryBoundKernel("cross-entropy", logits, logits, wide=5 * logits, kernels=4)
    backward = MemoryBoundKernel("cross-entropy-backward", logits, logits, wide=5 * logits, kernels=3)
    return LayerWork((forward,), (backward,), saved=Saved(logits, wide=logits))
