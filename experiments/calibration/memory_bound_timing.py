"""Timing of the engine's memory-bound kernels: seconds by kind for tensors of a number of elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F

from axonn.perf.layers.kernel_operations import StreamKind
from axonn.tensor import Dropout, TensorContext
from experiments.calibration.timing import Bench, Phases, differentiated

Probe: TypeAlias = Callable[[int, Bench], Mapping[StreamKind, float]]
_FEATURES = 256
_WORDS = 512
_SIDE = 8
_CHANNELS = 32


def _rows(elements: int, features: int = _FEATURES) -> tuple[int, int]:
    return max(1, elements // features), min(elements, features)


def _image(elements: int) -> tuple[int, int, int, int]:
    side = _SIDE
    return max(1, elements // (_CHANNELS * side**2)), min(_CHANNELS, elements // side**2), side, side


def _both(
    kind: StreamKind,
    function: Callable[..., torch.Tensor],
    shape: tuple[int, ...],
    bench: Bench,
    *,
    shared: tuple[torch.Tensor, ...] = (),
) -> Mapping[StreamKind, float]:
    """Time forward and backward of a function of one tensor and of `shared` parameters."""
    forward, backward = differentiated(function, lambda: (bench.pool.take(*shape),), bench, shared=shared)
    return {kind: forward, f"{kind}-backward": backward}  # type: ignore[dict-item]


def _alone(
    kind: StreamKind,
    operation: Callable[[torch.Tensor, torch.Tensor], object],
    shape: tuple[int, ...],
    bench: Bench,
) -> Mapping[StreamKind, float]:
    """Time an operation on one tensor with another, outside of autograd."""

    def sample() -> Phases:
        a, b = bench.pool.take(*shape), bench.pool.take(*shape)
        return (lambda: operation(a, b),)

    with torch.no_grad():
        return {kind: bench.timer.of(sample)[0]}


def _layer_norm(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    shape = _rows(elements)
    scale, shift = (torch.randn(shape[1], dtype=bench.pool.dtype, requires_grad=True) for _ in range(2))
    function = lambda x, w, b: F.layer_norm(x, shape[1:], w, b)  # noqa: E731
    return _both("layer-norm", function, shape, bench, shared=(scale, shift))


def _group_norm(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    shape = _image(elements)
    scale, shift = (torch.randn(shape[1], dtype=bench.pool.dtype, requires_grad=True) for _ in range(2))
    function = lambda x, w, b: F.group_norm(x, min(8, shape[1]), w, b)  # noqa: E731
    return _both("group-norm", function, shape, bench, shared=(scale, shift))


def _gelu(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    return _both("gelu", F.gelu, _rows(elements), bench)


def _silu(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    return _both("silu", F.silu, _rows(elements), bench)


def _softmax(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    return _both("softmax", partial(torch.softmax, dim=-1), _rows(elements), bench)


def _residual(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    shape = _rows(elements)
    return {
        **_alone("residual", torch.add, shape, bench),
        # The gradients of the two branches are added.
        **_alone("residual-backward", torch.add, shape, bench),
    }


def _dropout(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    context = TensorContext.serial()
    dropout = Dropout(0.1, name="calibration", context=context)
    shape = _rows(elements)
    with context.positions.at(0, range(shape[0])):
        return _both("dropout", dropout, shape, bench)


def _transpose(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    """Time the merge of heads into rows: [1, heads, rows, width] -> [1, rows, heads x width]."""
    width = 32
    shape = 1, 4, max(1, elements // (4 * width)), min(width, elements)
    return _alone("transpose", lambda x, _: x.transpose(1, 2).flatten(2), shape, bench)


def _embedding(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    rows, features = _rows(elements)
    table = torch.randn(_WORDS, features, dtype=bench.pool.dtype)
    index = torch.randint(_WORDS, (rows,))
    return {
        **_alone("embedding", lambda x, _: F.embedding(index, table), (rows, features), bench),
        **_alone("embedding-backward", lambda x, _: table.index_add_(0, index, x), (rows, features), bench),
    }


def _cross_entropy(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    rows, words = _rows(elements, _WORDS)
    targets = torch.randint(words, (rows,))
    return _both("cross-entropy", lambda x: F.cross_entropy(x.float(), targets), (rows, words), bench)


def _upsample(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    """Time an upsampling by 2; `elements` are those of the output."""
    images, channels, side, _ = _image(elements)
    shape = images, channels, side // 2, side // 2
    return _both("upsample", lambda x: F.interpolate(x, scale_factor=2.0), shape, bench)


def _concatenate(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    """Time a concatenation; `elements` are those of the output, half of which come from each of two tensors."""
    images, channels, side, _ = _image(elements)
    shape = images, max(1, channels // 2), side, side
    return _both("concatenate", lambda x: torch.cat([x, x], 1), shape, bench)


def _gradients(elements: int, bench: Bench) -> Mapping[StreamKind, float]:
    """Time the gradient of a bias, and the accumulation of a computed gradient."""
    shape = _rows(elements)
    bias = torch.zeros(shape[1], dtype=bench.pool.dtype)
    # Not taken from the pool, whose values must stay small.
    accumulated = torch.zeros(shape, dtype=bench.pool.dtype)
    return {
        **_alone("bias-backward", lambda g, _: bias.add_(g.sum(0)), shape, bench),
        **_alone("accumulate", lambda a, b: accumulated.add_(b), shape, bench),
    }


STREAMS: tuple[Probe, ...] = (
    _layer_norm,
    _group_norm,
    _gelu,
    _silu,
    _softmax,
    _residual,
    _dropout,
    _transpose,
    _embedding,
    _cross_entropy,
    _upsample,
    _concatenate,
    _gradients,
)
"""Probes, each of which measures one kind or a few related ones."""
