"""Timing of the engine's kernels over sizes: matrix products, convolutions, attention, the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from axonn.config.train_config import OptimizerConfig, OptimizerPlacement, PrecisionConfig
from axonn.device.streams import Timeline
from axonn.distributed.collectives import SerialCollectives
from axonn.grid import ProcessGrid
from axonn.inter_layer.stage import ParameterSpec
from axonn.optim.model_optimizer import ModelOptimizer
from axonn.placement import Placement
from axonn.tensor.gradient_accumulation import add_gradient, add_product
from experiments.calibration.memory_bound_timing import STREAMS
from experiments.calibration.timing import Bench, Phases, Timer, differentiated

_ROLES = ("forward", "input", "weight")
_KERNELS = (1, 3)
Shape: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Grids on which kernels are measured."""

    rows: Sequence[int]
    features: Sequence[int]
    elements: Sequence[int]
    parameters: Sequence[int]
    matrices: Sequence[int]
    positions: Sequence[int]
    widths: Sequence[int]
    images: Sequence[int]
    channels: Sequence[int]
    sides: Sequence[int]


FULL = Sizes(
    rows=(16, 32, 64, 128, 256, 512, 1024),
    features=(32, 64, 128, 256, 512, 1024, 2048),
    elements=tuple(1 << i for i in range(10, 23, 2)),
    parameters=tuple(1 << i for i in range(14, 25, 2)),
    matrices=(4, 16, 64),
    positions=(16, 64, 128, 256, 512),
    widths=(16, 32, 64),
    images=(1, 4, 16),
    channels=(2, 16, 32, 64, 128),
    sides=(4, 8, 16),
)
QUICK = Sizes(
    rows=(32, 128, 512),
    features=(64, 256, 1024),
    elements=(1 << 12, 1 << 16, 1 << 20),
    parameters=(1 << 16, 1 << 20),
    matrices=(4, 16),
    positions=(16, 64, 256),
    widths=(16, 64),
    images=(2, 8),
    channels=(8, 64),
    sides=(4, 8),
)


GPU = Sizes(
    rows=(128, 512, 2048, 8192, 16384),
    features=(64, 256, 1024, 2048, 4096, 8192, 16384),
    elements=tuple(1 << i for i in (12, 16, 20, 23, 26, 28)),
    parameters=tuple(1 << i for i in (16, 20, 22, 24, 27)),
    matrices=(16, 64, 256),
    positions=(64, 256, 1024, 2048),
    widths=(32, 64, 128),
    images=(4, 16, 64),
    channels=(4, 64, 256, 512),
    sides=(8, 16, 32),
)
GPU_QUICK = Sizes(
    rows=(128, 2048, 16384),
    features=(64, 1024, 4096, 8192),
    elements=tuple(1 << i for i in (12, 20, 26)),
    parameters=tuple(1 << i for i in (16, 22, 26)),
    matrices=(16, 128),
    positions=(64, 512, 1024),
    widths=(32, 64, 128),
    images=(4, 32),
    channels=(4, 128, 512),
    sides=(8, 32),
)


def sizes_of(device: torch.device, *, quick: bool) -> Sizes:
    """Return the sizes to measure on a device."""
    if device.type == "cpu":
        return QUICK if quick else FULL
    return GPU_QUICK if quick else GPU


def measure(sizes: Sizes, dtype: torch.dtype, timer: Timer, on_part: Callable[[str], None]) -> dict[str, Any]:
    """Return the tables of `axonn.perf.machine.kernel_tables.MeasuredKernels`, as plain data."""
    torch.manual_seed(0)
    bench = Bench.of(dtype, timer)
    on_part("matrix products")
    tables: dict[str, Any] = {"products": _products(sizes, bench)}
    on_part("convolutions")
    tables["convolutions"] = _convolutions(sizes, bench)
    on_part("attention")
    tables["attention"] = _attention(sizes, bench)
    on_part("streams")
    tables["streams"] = dict(_streams(sizes, bench)) | dict(_optimizers(sizes, bench))
    return tables


def _table(seconds: Sequence[float], **axes: Sequence[int]) -> dict[str, Any]:
    return {**{name: list(values) for name, values in axes.items()}, "us": [round(1e6 * t, 3) for t in seconds]}


def _products(sizes: Sizes, bench: Bench) -> dict[str, Any]:
    """Time the products [m, k] by [k, n] of a linear layer: y = x W^T + b, the input gradient g W, and the weight
    gradient g^T x, accumulated."""
    seconds: dict[str, list[float]] = {role: [] for role in _ROLES}
    tables: dict[str, Any] = {}
    for role in _ROLES:
        # The inner dimension of a weight gradient is the rows, of the others it is features.
        axes = (sizes.features, sizes.features, sizes.rows) if role == "weight" else (sizes.rows, *[sizes.features] * 2)
        for m, n, k in product(*axes):
            seconds[role].append(_product(role, m, n, k, bench))
        tables[role] = _table(seconds[role], m=axes[0], n=axes[1], k=axes[2])
    return tables


@torch.no_grad()
def _product(role: str, m: int, n: int, k: int, bench: Bench) -> float:
    shapes = {"forward": ((m, k), (n, k)), "input": ((m, k), (k, n)), "weight": ((k, m), (k, n))}[role]
    bias = torch.randn(n, dtype=bench.pool.dtype)
    parameter = _parameter(m, n, dtype=bench.pool.dtype) if role == "weight" else None

    def sample() -> Phases:
        a, b = bench.pool.take(*shapes[0]), bench.pool.take(*shapes[1])
        if parameter is not None:
            return (partial(add_product, parameter, a.t(), b),)
        return (partial(F.linear, a, b, bias) if role == "forward" else partial(torch.matmul, a, b),)

    return bench.timer.of(sample)[0]


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    parameter = nn.Parameter(torch.randn(*shape, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def _convolutions(sizes: Sizes, bench: Bench) -> dict[str, Any]:
    times: dict[str, list[float]] = {role: [] for role in _ROLES}
    axes = {"images": sizes.images, "inputs": sizes.channels, "outputs": sizes.channels, "size": sizes.sides}
    axes["kernel"] = _KERNELS
    for images, inputs, outputs, size, kernel in product(*axes.values()):
        shapes = (images, inputs, size, size), (images, outputs, size, size), (outputs, inputs, kernel, kernel)
        for role, seconds in _convolution(*shapes, bench).items():
            times[role].append(seconds)
    return {role: _table(seconds, **axes) for role, seconds in times.items()}


@torch.no_grad()
def _convolution(x_shape: Shape, y_shape: Shape, weight_shape: Shape, bench: Bench) -> dict[str, float]:
    weight = _parameter(*weight_shape, dtype=bench.pool.dtype)
    padding = weight_shape[-1] // 2
    bias = torch.randn(weight_shape[0], dtype=bench.pool.dtype)

    def gradient(x: torch.Tensor, g: torch.Tensor, *, of_input: bool) -> torch.Tensor:
        one, around = [1, 1], [padding, padding]
        mask = [of_input, not of_input, False]
        gradients: tuple[torch.Tensor, ...] = torch.ops.aten.convolution_backward(
            g, x, weight, None, one, around, one, False, [0, 0], 1, mask
        )
        return gradients[0 if of_input else 1]

    def sample() -> Phases:
        x, g = bench.pool.take(*x_shape), bench.pool.take(*y_shape)
        return (
            lambda: F.conv2d(x, weight, bias, padding=padding),
            lambda: gradient(x, g, of_input=True),
            lambda: add_gradient(weight, gradient(x, g, of_input=False)),
        )

    return dict(zip(_ROLES, bench.timer.of(sample), strict=True))


def _attention(sizes: Sizes, bench: Bench) -> dict[str, Any]:
    axes = {"matrices": sizes.matrices, "rows": sizes.positions, "width": sizes.widths}
    tables: dict[str, Any] = {}
    for causal in (False, True):
        times = [_attend(m, r, w, bench, causal=causal) for m, r, w in product(*axes.values())]
        for way, seconds in zip(("forward", "backward"), zip(*times, strict=True), strict=True):
            tables[f"causal-{way}" if causal else way] = _table(seconds, **axes)
    return tables


def _attend(matrices: int, rows: int, width: int, bench: Bench, *, causal: bool) -> tuple[float, float]:
    heads = min(4, matrices)

    def operands() -> tuple[torch.Tensor, ...]:
        # Strided as heads that are cut out of rows.
        return tuple(bench.pool.take(matrices // heads, rows, heads, width).transpose(1, 2) for _ in range(3))

    function = partial(F.scaled_dot_product_attention, is_causal=causal)
    return differentiated(function, operands, bench)


def _streams(sizes: Sizes, bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    for probe in STREAMS:
        times: dict[str, list[float]] = {}
        for elements in sizes.elements:
            for kind, seconds in probe(elements, bench).items():
                times.setdefault(kind, []).append(seconds)
        for name, of_kind in times.items():
            yield name, _table(of_kind, elements=sizes.elements)


def _optimizers(sizes: Sizes, bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Time the step of one bucket and the zeroing of its gradients, for each placement of the optimizer."""
    ways: tuple[tuple[str, OptimizerPlacement], ...] = (("adam", "device"), ("adam-offloaded", "offloaded"))
    for kind, placement in ways:
        seconds = [_optimizer(placement, elements, bench) for elements in sizes.parameters]
        yield kind, _table(seconds, elements=sizes.parameters)


def _fill(name: str, tensor: torch.Tensor) -> None:
    tensor.normal_()


def _optimizer(placement: OptimizerPlacement, elements: int, bench: Bench) -> float:
    dtype = bench.pool.dtype
    parameter = nn.Parameter(torch.empty(elements, dtype=dtype))
    optimizer = ModelOptimizer(
        [ParameterSpec(name="weight", parameter=parameter, placement=Placement(shape=(elements,)))],
        grid=ProcessGrid(),
        rank=0,
        collectives=SerialCollectives(ProcessGrid(), 0),
        config=OptimizerConfig(placement=placement, bsize=elements),
        precision=PrecisionConfig.model_validate(str(dtype).removeprefix("torch.")),
        initialise=_fill,
        timeline=Timeline(bench.pool.device, None),
    )
    assert parameter.grad is not None

    def step() -> None:
        optimizer.zero()
        optimizer.step(0)

    return bench.timer.of(lambda: (step,))[0]
