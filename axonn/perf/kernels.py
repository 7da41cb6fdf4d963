"""Seconds of the device kernels of a GPT: matrix products from a fitted curve, all else by bytes over bandwidth.

One set of kernels serves every framework. It is the transformer block as Megatron-LM runs it in half precision: fused
layer norm, fused bias + GELU, fused bias + dropout + residual, fused scale + mask + softmax (Narayanan et al., SC 2021,
section 4.2), one kernel each for the rest. Communication is not in here (see `axonn.perf.network`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from axonn.config import GPTConfig
from axonn.perf.machine import GpuSpec

HALF = 2
"""Bytes of a half-precision number."""
SINGLE = 4
_SPLITS = (1, 2, 4, 8, 16, 32, 64)


def gemm_time(gpu: GpuSpec, m: int, n: int, k: int, *, batch: int = 1) -> float:
    """Seconds of `batch` half-precision products of `[m, k]` and `[k, n]`.

    The fastest of the curve's kernels: blocks are handed to the multiprocessors in waves (NVIDIA, Matrix Multiplication
    Background User's Guide: tile and wave quantisation), the inner dimension may be split over several blocks, and no
    kernel is faster than its operands can be moved. Coefficients: `GemmCurve`.
    A product with a dimension that is no multiple of the alignment runs without matrix units (same guide, section on
    tensor core requirements; libraries before cuBLAS 11).
    """
    curve = gpu.gemm
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
    """Seconds of `kernels` kernels that together read and write `nbytes` and compute little."""
    return kernels * gpu.kernel_latency.si + nbytes / gpu.stream_bandwidth.si


@dataclass(frozen=True)
class KernelTimes:
    """Seconds of the parts of one rank's share of a model, for one microbatch.

    `microbatch` sequences; the weights are cut over `row x col` ranks (DESIGN section 5). Activations between layers
    are cut along row only, so norms and residuals are computed by every rank of a column group.
    """

    gpu: GpuSpec
    model: GPTConfig
    microbatch: int
    row: int = 1
    col: int = 1

    @property
    def rows(self) -> int:
        """Rows of the activations: tokens of the microbatch."""
        return self.microbatch * self.model.seq_len

    @property
    def _linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the four matrices of a block on this rank."""
        h, r, c = self.model.hidden, self.row, self.col
        return (h // r, 3 * h // c), (h // c, h // r), (h // r, 4 * h // c), (4 * h // c, h // r)

    @property
    def block_parameters(self) -> int:
        """Parameters of one block on this rank (its matrices; biases and norms are 0.1% of them)."""
        return sum(i * o for i, o in self._linears)

    @property
    def vocabulary(self) -> int:
        """Words of this rank's share of the embedding, padded to a multiple of 128 as Megatron-LM does."""
        share = ceil(self.model.vocab / self.col)
        return 128 * ceil(share / 128)

    def _gemm(self, m: int, n: int, k: int, batch: int = 1) -> float:
        return gemm_time(self.gpu, m, n, k, batch=batch)

    def _stream(self, nbytes: float, kernels: int = 1) -> float:
        return self.gpu.in_layer.stream_slowdown * stream_time(self.gpu, nbytes, kernels=kernels)

    def _accumulate(self, parameters: float) -> float:
        """A weight gradient is added to that of the microbatches before: read both, write one."""
        return stream_time(self.gpu, 3 * HALF * parameters)

    @cached_property
    def _attention(self) -> tuple[int, int, int]:
        """Matrices of the attention (heads times sequences), their rows, and the width of a head."""
        heads = max(1, self.model.heads // self.col)
        return self.microbatch * heads, self.model.seq_len, self.model.hidden // self.model.heads

    @cached_property
    def _sizes(self) -> tuple[float, float, float]:
        """Bytes of an activation as it lies between layers, of one inside a layer, and of the attention's scores."""
        whole = HALF * self.rows * self.model.hidden
        matrices, s, _ = self._attention
        return whole / self.row, whole / self.col, HALF * matrices * s * s

    @cached_property
    def forward_parts(self) -> tuple[float, float]:
        """(matrix products, all else) of one block's forward, each as if alone on the device."""
        full, cut, scores = self._sizes
        matrices, s, width = self._attention
        gemms = sum(self._gemm(self.rows, o, i) for i, o in self._linears)
        gemms += self._gemm(s, s, width, matrices) + self._gemm(s, width, s, matrices)
        streams = (
            2 * 2 * full  # layer norms: read, write
            + 2 * 3.5 * full  # bias, dropout (a mask of bytes), residual: read two, write one
            + 6 * cut  # bias of QKV
            + 2 * cut  # heads back in one row
            + 2 * scores  # scale, mask, softmax
            + 2.5 * scores  # dropout of the attention
            + 8 * cut  # bias, GELU
        )
        return gemms, stream_time(self.gpu, streams, kernels=9)

    @cached_property
    def backward_parts(self) -> tuple[float, float]:
        """(matrix products, all else) of one block's backward, without recomputation and gradient accumulation."""
        full, cut, scores = self._sizes
        matrices, s, width = self._attention
        gemms = sum(self._gemm(self.rows, i, o) + self._gemm(i, o, self.rows) for i, o in self._linears)
        gemms += 2 * (self._gemm(s, s, width, matrices) + self._gemm(s, width, s, matrices))
        streams = (
            2 * 3 * full  # layer norms: gradient and input in, gradient out
            + 2 * 2 * full  # their weights' gradients
            + 2 * 2.5 * full  # dropouts
            + 2 * 3 * full  # gradients of residual and branch added
            + 2 * full
            + 7 * cut  # bias gradients: read the output's gradient
            + 6 * cut  # gradients of Q, K and V into one tensor
            + 2 * cut  # heads
            + 3 * scores  # softmax: gradient and output in, gradient out
            + 2.5 * scores  # dropout of the attention
            + 12 * cut  # GELU: gradient and input in, gradient out
        )
        return gemms, stream_time(self.gpu, streams, kernels=19)

    @property
    def block_forward(self) -> float:
        """One transformer block, forward."""
        gemms, streams = self.forward_parts
        return self.gpu.in_layer.gemm_slowdown * gemms + self.gpu.in_layer.stream_slowdown * streams

    @property
    def block_backward(self) -> float:
        """One transformer block, backward, without the forward that recomputes it."""
        gemms, streams = self.backward_parts
        accumulate = sum(self._accumulate(i * o) for i, o in self._linears)
        return self.gpu.in_layer.gemm_slowdown * gemms + self.gpu.in_layer.stream_slowdown * streams + accumulate

    @cached_property
    def embedding_forward(self) -> float:
        """Look-up of words and positions, sum, dropout."""
        full, _, _ = self._sizes
        return self._stream((2 + 3 + 2.5) * full, kernels=3)

    @cached_property
    def embedding_backward(self) -> float:
        """Dense gradient of the table: cleared, rows added, then accumulated like any weight's gradient."""
        full, _, _ = self._sizes
        table = self.vocabulary * self.model.hidden / self.row
        return self._stream((2.5 + 3) * full + HALF * table, kernels=3) + self._accumulate(table)

    @cached_property
    def head_forward(self) -> float:
        """Last norm, logits, and the cross-entropy in single precision."""
        full, _, _ = self._sizes
        gemm = self._gemm(self.rows, self.vocabulary, self.model.hidden // self.row)
        # To single precision (2 in, 4 out), largest (4), minus it and exponential (4 + 4), sum (4).
        loss = (2 + 4 + 4 + 8 + 4) * self.rows * self.vocabulary
        return self.gpu.in_layer.gemm_slowdown * gemm + self._stream(2 * full + loss, kernels=6)

    @cached_property
    def head_backward(self) -> float:
        """Gradients of cross-entropy, logits' weight and input, and of the last norm. The head is not recomputed."""
        full, _, _ = self._sizes
        hidden = self.model.hidden // self.row
        gemms = self._gemm(self.rows, hidden, self.vocabulary) + self._gemm(hidden, self.vocabulary, self.rows)
        # Softmax from the exponentials and its gradient (4 + 4, 4 + 4), to half precision (4 in, 2 out).
        loss = (8 + 8 + 6) * self.rows * self.vocabulary
        streams = self._stream(5 * full + loss, kernels=6)
        return self.gpu.in_layer.gemm_slowdown * gemms + streams + self._accumulate(self.vocabulary * hidden)
