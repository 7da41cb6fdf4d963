"""Seconds of operations on a device: matrix products from a fitted curve, all else by bytes over bandwidth.

One set of kernels serves every framework and every model. See `axonn.perf.machine.network` for communication.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from axonn.errors import ConfigError
from axonn.perf.layers.kernel_operations import AttentionKernel, Convolution, MemoryBoundKernel, Operation, Product
from axonn.perf.machine.machine_file import GpuSpec

HALF = 2
"""Bytes of a half-precision number."""
SINGLE = 4
"""Bytes of a single-precision number."""
_SPLITS = (1, 2, 4, 8, 16, 32, 64)


def gemm_time(gpu: GpuSpec, m: int, n: int, k: int, *, batch: int = 1) -> float:
    """Return the seconds of `batch` half-precision products of `[m, k]` and `[k, n]`.

    They are those of the fastest of the curve's kernels: blocks are assigned to the multiprocessors in waves (NVIDIA,
    Matrix Multiplication Background User's Guide: tile and wave quantisation), the inner dimension may be split over
    several blocks, and memory traffic of the operands is a lower bound. Coefficients: `GemmCurve`.
    A product with a dimension that is no multiple of the alignment runs without matrix units (same guide, table of
    tensor core requirements: before cuBLAS 11 multiples of 8; since then odd ones are slow, see `summit.yaml`).
    Raises `ConfigError` when the machine file has no GEMM curve.
    """
    curve = gpu.gemm
    if curve is None:
        raise ConfigError(f"the machine file has no GEMM curve of {gpu.name}; give gpu.gemm")
    bandwidth = gpu.memory_bandwidth.si * curve.memory_efficiency
    memory = batch * HALF * (m * k + k * n + m * n) / bandwidth
    step = gpu.alignment.number
    aligned = m % step == n % step == k % step == 0
    peak = (gpu.peak if aligned else gpu.vector_peak).si
    sms = gpu.multiprocessors.number
    best = float("inf")
    for tile in curve.tiles:
        area = 2 * tile.rows * tile.columns / (tile.efficiency * peak / sms)
        shapes = {(tile.rows, tile.columns), (tile.columns, tile.rows)}
        blocks = batch * min(ceil(m / rows) * ceil(n / columns) for rows, columns in shapes)
        for split in _SPLITS:
            waves = blocks * split / sms
            waves += (ceil(waves) - waves) * curve.wave_quantisation
            seconds = max(waves * area * (k / split + curve.k_overhead), memory)
            if split > 1:
                seconds += 2 * split * batch * m * n * SINGLE / bandwidth
            best = min(best, seconds)
    return curve.launch_us * 1e-6 + best


def stream_time(gpu: GpuSpec, nbytes: float, *, kernels: int = 1) -> float:
    """Return the seconds of `kernels` memory-bound kernels that together read and write `nbytes`."""
    return kernels * gpu.kernel_latency.si + nbytes / gpu.stream_bandwidth.si


class Kernels:
    """Seconds of operations on one device, in a compute type of `element` bytes; results are cached."""

    def __init__(self, gpu: GpuSpec, *, element: int = HALF, busy: int = 1) -> None:
        """Select the tables for `busy` devices of the node computing at the same time."""
        self.gpu = gpu
        self.element = element
        self.tables = gpu.tables(element=element, busy=busy)
        self._seconds: dict[Operation, float] = {}

    def seconds(self, operation: Operation) -> float:
        """Return the seconds of one operation inside a training step."""
        seconds = self._seconds.get(operation)
        if seconds is None:
            products, streams = self.alone(operation)
            in_layer = self.gpu.in_layer
            if in_layer is not None:
                products, streams = in_layer.gemm_slowdown * products, in_layer.stream_slowdown * streams
            seconds = self._seconds[operation] = products + streams + self._host(operation)
        return seconds

    def total(self, operations: Iterable[Operation]) -> float:
        """Return the seconds of operations that run one after the other."""
        return sum(map(self.seconds, operations))

    def alone(self, operation: Operation) -> tuple[float, float]:
        """Return the seconds (in matrix products, in all else) of an operation that has the device to itself."""
        measured = self.measured(operation)
        if measured is not None:
            return (0.0, measured) if isinstance(operation, MemoryBoundKernel) else (measured, 0.0)
        match operation:
            case Product(m, n, k, batch):
                return self._product(m, n, k, batch=batch), 0.0
            case Convolution():
                return self._convolution(operation), 0.0
            case AttentionKernel():
                return self._attention(operation)
            case MemoryBoundKernel():
                nbytes = operation.bytes(self.element)
                return 0.0, stream_time(self.gpu, nbytes, kernels=operation.kernels)

    def measured(self, operation: Operation) -> float | None:
        """Return the seconds of an operation alone on the device from the machine file's tables; None without one."""
        return None if self.tables is None else self.tables.seconds(operation)

    def _attention(self, attention: AttentionKernel) -> tuple[float, float]:
        """Return the seconds (in matrix products, in all else) of attention whose scores are in memory.

        Two batched products; between them scale, mask and softmax in one kernel, then dropout.
        """
        matrices, s, width, _, dropout, backward = attention
        products = self._product(s, s, width, batch=matrices) + self._product(s, width, s, batch=matrices)
        scores = matrices * s * s
        streams = [MemoryBoundKernel("softmax", scores, (3 if backward else 2) * scores)]
        if dropout:
            streams.append(MemoryBoundKernel("dropout", scores, 2 * scores, mask=scores))
        seconds = sum(self.alone(stream)[1] for stream in streams)
        return (2 * products if backward else products), seconds

    def _convolution(self, c: Convolution) -> float:
        """Return the seconds of the equivalent matrix product, with one row per output pixel (implicit GEMM)."""
        pixels, window = c.images * c.size**2, c.inputs * c.kernel**2
        m, n, k = {
            "forward": (pixels, c.outputs, window),
            "input": (pixels * c.stride**2, c.inputs, -(-c.outputs * c.kernel**2 // c.stride**2)),
            "weight": (c.outputs, window, pixels),
        }[c.role]
        return self._product(m, n, k)

    def _product(self, m: int, n: int, k: int, *, batch: int = 1) -> float:
        if self.tables is None:
            return gemm_time(self.gpu, m, n, k, batch=batch)
        return batch * self.tables.products["forward"].at(m, n, k)

    def _host(self, operation: Operation) -> float:
        """Return the seconds that the device waits for its host."""
        host = self.gpu.host
        if host is None:
            return 0.0
        match operation:
            case Product(role=role) | Convolution(role=role):
                forward = role == "forward"
            case AttentionKernel(backward=backward):
                forward = not backward
            case MemoryBoundKernel(kind):
                forward = not kind.endswith("-backward")
        return (host.forward if forward else host.backward).si
