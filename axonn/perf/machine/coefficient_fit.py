"""Fits of coefficients of machine files, printed with their errors as YAML.

Run `python -m axonn.perf.machine.coefficient_fit CSV`. The columns of the CSV determine what is fitted:

- `m,n,k,time_ms` (half-precision GEMM measurements, such as the Baidu DeepBench V100 fp16 GEMM results): `GemmCurve`;
- `bytes` and columns that end in `_ms` (times of messages by size): one `Curve` per column;
- `batch,seq_len,hidden,heads,part,time_ms` (kernels from another source than the GEMM measurements): `InLayer`, with
  the other coefficients of the device from `--machine`. part: layer, all kernels of a transformer layer, forward and
  backward; gemm, its matrix products; forward, its matrix products in the forward only; square, one product
  [hidden, hidden]^2.

The first two fits minimise the mean |log(predicted / measured)|, the last the squares of the relative errors.
All fits are deterministic.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import yaml

from axonn.errors import DataError
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import outline_of
from axonn.perf.layers.kernel_operations import MemoryBoundKernel, Operation, Product
from axonn.perf.layers.layer_work import work_of
from axonn.perf.machine.kernel_times import Kernels
from axonn.perf.machine.machine_file import GpuSpec, load_machine

Array: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]

TILES = ((256, 128), (128, 128), (128, 64), (64, 64), (64, 32))
"""Tile sizes of cuBLAS (NVIDIA, Matrix Multiplication Background User's Guide, section 2.3)."""
_SPLITS = (1, 2, 4, 8, 16, 32, 64)


def gemm_model(p: Array, shapes: Array, *, peak: float, bandwidth: float, multiprocessors: int) -> Array:
    """Return the seconds of products: `axonn.perf.machine.kernel_times.gemm_time`, vectorised.

    `shapes`: rows (m, n, k). `p`: launch (s), k overhead, memory efficiency, wave quantisation, and the efficiency of
    each of `TILES`.
    """
    m, n, k = shapes.T
    launch, overhead, memory_efficiency, quantisation = p[:4]
    memory = (m * k + k * n + m * n) * 2 / (bandwidth * memory_efficiency)
    best = np.full(len(shapes), np.inf)
    for (rows, columns), efficiency in zip(TILES, p[4:], strict=True):
        blocks = np.minimum(np.ceil(m / rows) * np.ceil(n / columns), np.ceil(m / columns) * np.ceil(n / rows))
        area = 2 * rows * columns / (efficiency * peak / multiprocessors)
        for split in _SPLITS:
            waves = blocks * split / multiprocessors
            waves = waves + (np.ceil(waves) - waves) * quantisation
            seconds = np.maximum(waves * area * (k / split + overhead), memory)
            if split > 1:
                seconds = seconds + 2 * split * m * n * 4 / (bandwidth * memory_efficiency)
            best = np.minimum(best, seconds)
    return np.asarray(launch + best, dtype=np.float64)


def fit_gemm(shapes: Array, seconds: Array, *, peak: float, bandwidth: float, multiprocessors: int) -> Array:
    """Fit the coefficients of `gemm_model` by random search: one coordinate at a time, with shrinking steps."""
    low = np.array([1e-6, 0.0, 0.3, 0.0] + [0.2] * len(TILES))
    high = np.array([12e-6, 600.0, 1.2, 1.0] + [1.0] * len(TILES))
    rng = np.random.default_rng(0)

    def loss(p: Array) -> float:
        predicted = gemm_model(p, shapes, peak=peak, bandwidth=bandwidth, multiprocessors=multiprocessors)
        return float(np.mean(np.abs(np.log(predicted / seconds))))

    best = np.array([5e-6, 60.0, 0.8, 0.7, 0.9, 0.88, 0.75, 0.6, 0.45])
    least = loss(best)
    steps = 1500
    for i in range(steps):
        candidate = best.copy()
        j = rng.integers(len(best))
        candidate[j] += rng.normal() * 0.2 * (1 - 0.98 * i / steps) * (high[j] - low[j])
        candidate = np.clip(candidate, low, high)
        candidate_loss = loss(candidate)
        if candidate_loss < least:
            best, least = candidate, candidate_loss
    return best


def held_out_error(n: int, fit_and_predict: Callable[[Indices, Indices], Array], measured: Array) -> float:
    """Return the mean |predicted / measured - 1| over 5 folds. `fit_and_predict(train, test)` takes indices."""
    order = np.random.default_rng(1).permutation(n)
    errors = []
    for fold in range(5):
        test = order[fold::5]
        train = np.setdiff1d(order, test)
        errors.append(np.abs(fit_and_predict(train, test) / measured[test] - 1))
    return float(np.mean(np.concatenate(errors)))


def fit_curve(sizes: Array, seconds: Array, *, segments: int) -> list[tuple[float, float, float, float]]:
    """Fit a curve of `segments` segments, each `latency + bytes / bandwidth` over a contiguous range of the sizes.

    Returns (min bytes, max bytes, latency s, bytes/s) per segment; a segment has at least three points. The cuts are
    optimal (dynamic programming).
    """
    count = len(sizes)
    cost = np.full((count, count + 1), np.inf)
    lines: dict[tuple[int, int], tuple[float, float]] = {}
    for i in range(count):
        for j in range(i + 3, count + 1):
            lines[i, j] = _line(sizes[i:j], seconds[i:j])
            latency, bandwidth = lines[i, j]
            cost[i, j] = np.sum(np.abs(np.log((latency + sizes[i:j] / bandwidth) / seconds[i:j])))
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [0])}
    for used in range(1, segments + 1):
        for j in range(1, count + 1):
            options = [
                (best[used - 1, i][0] + float(cost[i, j]), [*best[used - 1, i][1], j])
                for i in range(j)
                if (used - 1, i) in best and np.isfinite(cost[i, j])
            ]
            if options:
                best[used, j] = min(options)
    cuts = best[segments, count][1]
    return [(float(sizes[i]), float(sizes[j - 1]), *lines[i, j]) for i, j in pairwise(cuts)]


def _line(sizes: Array, seconds: Array) -> tuple[float, float]:
    """Fit (latency, bandwidth) by least squares of the relative errors, both constrained to be non-negative."""
    weights = 1 / seconds
    matrix = np.stack([weights, sizes * weights], axis=1)
    (latency, slope), *_ = np.linalg.lstsq(matrix, np.ones(len(sizes)), rcond=None)
    if latency < 0:
        latency, slope = 0.0, float(np.sum(sizes * weights) / np.sum((sizes * weights) ** 2))
    if slope <= 0:
        latency, slope = float(np.sum(weights) / np.sum(weights**2)), 1e-15
    return float(latency), float(1 / slope)


def evaluate_curve(curve: Sequence[tuple[float, float, float, float]], sizes: Array) -> Array:
    """Return the seconds of the fitted curve; between two segments the time is interpolated."""
    result = []
    for size in sizes:
        below = curve[0]
        value = None
        for segment in curve:
            if size < segment[0]:
                left, right = below[2] + below[1] / below[3], segment[2] + segment[0] / segment[3]
                value = left + (size - below[1]) / (segment[0] - below[1]) * (right - left)
                break
            below = segment
            if size <= segment[1]:
                break
        result.append(below[2] + size / below[3] if value is None else value)
    return np.array(result)


def describe_gemm(
    rows: list[dict[str, str]], *, peak: float, bandwidth: float, multiprocessors: int
) -> dict[str, object]:
    """Fit the `gemm` section of a machine file."""
    shapes = np.array([[float(r["m"]), float(r["n"]), float(r["k"])] for r in rows])
    seconds = np.array([float(r["time_ms"]) for r in rows]) * 1e-3
    machine = {"peak": peak, "bandwidth": bandwidth, "multiprocessors": multiprocessors}

    def predict(p: Array, points: Indices) -> Array:
        return gemm_model(p, shapes[points], peak=peak, bandwidth=bandwidth, multiprocessors=multiprocessors)

    def fit(points: Indices) -> Array:
        return fit_gemm(
            shapes[points], seconds[points], peak=peak, bandwidth=bandwidth, multiprocessors=multiprocessors
        )

    everything = np.arange(len(rows))
    p = fit(everything)
    errors = np.abs(predict(p, everything) / seconds - 1)
    large = np.all(shapes >= 512, axis=1)
    held_out = held_out_error(len(rows), lambda train, test: predict(fit(train), test), seconds)
    return {
        "launch_us": round(float(p[0]) * 1e6, 3),
        "k_overhead": round(float(p[1]), 1),
        "memory_efficiency": round(float(p[2]), 4),
        "wave_quantisation": round(float(p[3]), 4),
        "tiles": [
            {"rows": t[0], "columns": t[1], "efficiency": round(float(e), 4)} for t, e in zip(TILES, p[4:], strict=True)
        ],
        "fit": {
            "source": "say here what was measured",
            "points": len(rows),
            "in_sample_error_pct": round(100 * float(np.mean(errors)), 2),
            "held_out_error_pct": round(100 * held_out, 2),
            "note": f"mean error {100 * float(np.mean(errors[large])):.1f}% on the {int(large.sum())} points whose "
            f"three dimensions are at least 512; fitted with {machine}",
        },
    }


def describe_curves(rows: list[dict[str, str]], *, segments: int, min_bytes: float) -> dict[str, object]:
    """Fit one curve per column that ends in `_ms`."""
    kept = [r for r in rows if float(r["bytes"]) >= min_bytes]
    sizes = np.array([float(r["bytes"]) for r in kept])
    curves: dict[str, object] = {}
    for column in (c for c in kept[0] if c.endswith("_ms")):
        seconds = np.array([float(r[column]) for r in kept]) * 1e-3
        curve = fit_curve(sizes, seconds, segments=segments)
        in_sample = float(np.mean(np.abs(evaluate_curve(curve, sizes) / seconds - 1)))
        held_out = held_out_error(len(sizes), _curve_fold(sizes, seconds, segments), seconds)
        curves[column.removesuffix("_ms")] = {
            "segments": [
                {
                    "min_bytes": low,
                    "max_bytes": high,
                    "latency_us": round(latency * 1e6, 3),
                    "gb_per_s": round(bandwidth / 1e9, 4),
                }
                for low, high, latency, bandwidth in curve
            ],
            "fit": {
                "source": "say here what was measured",
                "points": len(kept),
                "in_sample_error_pct": round(100 * in_sample, 2),
                "held_out_error_pct": round(100 * held_out, 2),
            },
        }
    return curves


def _curve_fold(sizes: Array, seconds: Array, segments: int) -> Callable[[Indices, Indices], Array]:
    return lambda train, test: evaluate_curve(fit_curve(sizes[train], seconds[train], segments=segments), sizes[test])


def row_operations(row: dict[str, str]) -> Iterator[Operation]:
    """Yield the operations that a row of a kernel CSV timed, in layers without gradient accumulation."""
    hidden, part = int(row["hidden"]), row["part"]
    if part == "square":
        yield Product(hidden, hidden, hidden)
        return
    model = GPTConfig(
        name="layer",
        layers=1,
        hidden=hidden,
        heads=int(row["heads"]),
        seq_len=int(row["seq_len"]),
        vocab=2,
        dropout=0.1,
        attention_dropout=0.1,
    )
    for link in outline_of(model).links:
        for layer in link.parts.values() if link.block is not None else ():
            work = work_of(layer, ProcessGrid(), int(row["batch"]))
            backward = () if part == "forward" else (*work.backward, *work.weight)
            for operation in (*work.forward, *backward):
                if not (isinstance(operation, MemoryBoundKernel) and operation.kind == "accumulate"):
                    yield operation


def describe_layers(rows: list[dict[str, str]], gpu: GpuSpec) -> dict[str, object]:
    """Fit the `in_layer` section: two slowdowns by least squares of the relative errors, validated leave-one-out."""
    kernels = Kernels(gpu)
    times = []
    for row in rows:
        gemms = streams = 0.0
        for operation in row_operations(row):
            in_gemm, in_stream = kernels.alone(operation)
            gemms, streams = gemms + in_gemm, streams + in_stream
        times.append([gemms, streams if row["part"] == "layer" else 0.0])
    seconds = np.array([float(r["time_ms"]) for r in rows]) * 1e-3
    relative = np.array(times) / seconds[:, None]

    def fit(points: Indices) -> Array:
        solution, *_ = np.linalg.lstsq(relative[points], np.ones(len(points)), rcond=None)
        return np.asarray(solution, dtype=np.float64)

    everything = np.arange(len(rows))
    slowdowns = fit(everything)
    held_out = [abs(float(relative[i] @ fit(np.delete(everything, i))) - 1) for i in everything]
    return {
        "gemm_slowdown": round(float(slowdowns[0]), 3),
        "stream_slowdown": round(float(slowdowns[1]), 3),
        "fit": {
            "source": "say here what was measured",
            "points": len(rows),
            "in_sample_error_pct": round(100 * float(np.mean(np.abs(relative @ slowdowns - 1))), 2),
            "held_out_error_pct": round(100 * float(np.mean(held_out)), 2),
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit the CSV named on the command line and print YAML for a machine file.

    Raises `DataError` for unknown columns.
    """
    parser = argparse.ArgumentParser(prog="python -m axonn.perf.machine.coefficient_fit", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--peak-tflops", type=float, default=125.0, help="matrix peak of the device (default: V100)")
    parser.add_argument("--memory-gb-per-s", type=float, default=900.0, help="peak memory bandwidth (default: V100)")
    parser.add_argument("--multiprocessors", type=int, default=80, help="multiprocessors (default: V100)")
    parser.add_argument("--machine", type=Path, help="machine file with the device's other coefficients, for layers")
    parser.add_argument("--segments", type=int, default=3, help="pieces of a message curve")
    parser.add_argument("--min-bytes", type=float, default=0.0, help="leave out smaller messages")
    options = parser.parse_args(arguments)
    with options.csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = set(rows[0]) if rows else set()
    if {"m", "n", "k", "time_ms"} <= columns:
        result = describe_gemm(
            rows,
            peak=options.peak_tflops * 1e12,
            bandwidth=options.memory_gb_per_s * 1e9,
            multiprocessors=options.multiprocessors,
        )
    elif {"part", "seq_len", "time_ms"} <= columns:
        if options.machine is None:
            raise DataError(f"{options.csv}: layers are fitted on top of a machine file; give it with --machine")
        result = describe_layers(rows, load_machine(options.machine).gpu)
    elif "bytes" in columns:
        result = describe_curves(rows, segments=options.segments, min_bytes=options.min_bytes)
    else:
        raise DataError(
            f"{options.csv}: has neither the columns m, n, k, time_ms nor bytes and *_ms, nor those of layers; "
            "rename its columns"
        )
    print(yaml.safe_dump(result, sort_keys=False))


if __name__ == "__main__":
    main()
