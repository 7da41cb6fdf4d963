"""Task: the best large bfloat16 product of this device, its memory and its clocks."""

from __future__ import annotations

from typing import Any

import torch

from axonn.training.provenance import gpu_facts
from baselines.gpu.peaks import best_product, wait_for

REPEATS = 20
BUSY_S = 1.5
"""Seconds for which the device is kept busy while its clocks are read."""


def run(*, device: torch.device, seconds: float, size: int) -> dict[str, Any]:
    """Return fields of `baselines.gpu.peaks.Peak`; the product is of two matrices of `size`."""
    tflops = best_product(device, size=size, repeats=REPEATS)
    fields: dict[str, Any] = {"product_tflops": tflops, "product_size": size}
    if device.type == "cuda":
        fields["memory"] = torch.cuda.get_device_properties(device).total_memory
        fields["clocks_under_load"] = clocks_under_load(device, size, each_s=2 * size**3 / tflops / 1e12)
    return fields


def clocks_under_load(device: torch.device, size: int, *, each_s: float) -> dict[str, float] | None:
    """Read the clocks while products, which take `each_s` seconds, are queued on the device."""
    a = torch.randn(size, size, device=device).to(torch.bfloat16)
    out = torch.empty_like(a)
    for _ in range(int(BUSY_S / each_s)):
        torch.matmul(a, a, out=out)
    clocks: dict[str, float] | None = gpu_facts().get("clocks")
    wait_for(device)
    return clocks
