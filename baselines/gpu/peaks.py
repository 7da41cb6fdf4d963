"""Peak rates of devices: dense bfloat16 peaks by name, from data sheets, and a product to measure."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from axonn.config.train_config import StrictModel


class DataSheetPeak(NamedTuple):
    """A data sheet's dense bfloat16 TFLOP/s, without sparsity. `pattern`: of the name as PyTorch reports it."""

    pattern: str
    tflops: float
    source: str


PEAKS: tuple[DataSheetPeak, ...] = (
    # The first match counts, so special models come before their family.
    DataSheetPeak(r"H200 NVL", 835.5, "NVIDIA H200 data sheet, H200 NVL: 1,671 TFLOPS with sparsity, half of it dense"),
    DataSheetPeak(r"H200", 989.4, "NVIDIA H200 data sheet, SXM: 1,979 TFLOPS with sparsity, half of it dense"),
    DataSheetPeak(r"H100 PCIe", 756.0, "NVIDIA H100 data sheet, PCIe: 1,513 TFLOPS with sparsity, half of it dense"),
    DataSheetPeak(r"H100 NVL", 835.5, "NVIDIA H100 data sheet, NVL: 1,671 TFLOPS with sparsity, half of it dense"),
    DataSheetPeak(r"H100", 989.4, "NVIDIA H100 data sheet, SXM: 1,979 TFLOPS with sparsity, half of it dense"),
    DataSheetPeak(r"A100", 312.0, "NVIDIA A100 data sheet: 312 TFLOPS"),
    DataSheetPeak(r"A30\b", 165.0, "NVIDIA A30 data sheet: 165 TFLOPS"),
    DataSheetPeak(r"A40\b", 149.7, "NVIDIA A40 data sheet: 149.7 TFLOPS"),
    DataSheetPeak(r"L40S", 362.05, "NVIDIA L40S data sheet: 362.05 TFLOPS"),
)


class Peak(StrictModel):
    """The peak that shares refer to. `tflops`: None where neither a data sheet nor a measurement gives it."""

    device: str
    tflops: float | None = None
    source: str
    product_tflops: float | None = None
    """TFLOP/s of the best measured large product of two square bfloat16 matrices."""
    product_size: int | None = None
    memory: int | None = None
    """Bytes of the device, as PyTorch reports; None for a CPU."""
    clocks_under_load: dict[str, float] | None = None
    """Clocks as in `axonn.observability.records.Machine.clocks`, while it computes such products."""


def data_sheet(device: str) -> DataSheetPeak | None:
    """Return the data sheet's entry of a device by its name; None for an unknown one."""
    return next((known for known in PEAKS if re.search(known.pattern, device)), None)


def peak_of(device: str, measured: Mapping[str, Any]) -> Peak:
    """Return the data sheet's peak, otherwise the best measured product's.

    `measured`: fields of `Peak`, as far as there are any.
    """
    known = data_sheet(device)
    product_tflops, product_size = measured.get("product_tflops"), measured.get("product_size")
    if known is not None:
        return Peak(device=device, tflops=known.tflops, source=known.source, **measured)
    if product_tflops is None:
        return Peak(device=device, source="no data sheet is known here, and no product was measured", **measured)
    source = f"no data sheet of this device is known here: the best measured bfloat16 product of size {product_size}"
    return Peak(device=device, tflops=product_tflops, source=source, **measured)


def best_product(device: torch.device, *, size: int, repeats: int) -> float:
    """Return the TFLOP/s of the fastest of some products of two `size` x `size` bfloat16 matrices of normal values."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    torch.matmul(a, b, out=out)
    best = float("inf")
    for _ in range(repeats):
        wait_for(device)
        start = time.perf_counter()
        torch.matmul(a, b, out=out)
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all its work; called outside of what is timed, or at its end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
