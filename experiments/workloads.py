"""Fixed workloads of all benchmarks and comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "small": {"layers": 6, "hidden": 256, "heads": 4, "seq_len": 128, "vocab": 8192},
    "wide": {"layers": 6, "hidden": 768, "heads": 12, "seq_len": 128, "vocab": 8192},
    # For testing the benchmarks themselves; its times mean nothing.
    "tiny": {"layers": 4, "hidden": 64, "heads": 4, "seq_len": 16, "vocab": 512},
}
MICROBATCHES, MICROBATCH_SIZE = 8, 4
SAME_WORK = 1e-4
"""Largest relative difference of float32 losses at which contenders have done the same work."""


def config_of(workload: str, grid: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration of a workload on a grid: 8 microbatches of 4 sequences on each pipeline."""
    return {
        "model": {"name": workload, **SHAPES[workload]},
        "grid": dict(grid),
        "batch_size": MICROBATCHES * MICROBATCH_SIZE * grid.get("data", 1),
        "microbatch_size": MICROBATCH_SIZE,
    }
