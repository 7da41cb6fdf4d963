"""Helpers that the parts share: throughput by a named formula, and rows of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from axonn.config.model_config import ModelConfig
from axonn.config.train_config import TrainConfig
from axonn.observability.records import Failure, Workload
from baselines.equal_work import difference
from baselines.gpu.bench_context import Context
from baselines.statistics import middle_half

TOLERANCE = 5e-3
"""Largest relative difference of bfloat16 losses at which contenders have done the same work: of single batches, with
float32 masters and the loss in float32. Another seed, or a lost microbatch, makes ten times that after a few
batches."""


def flops_of(model: ModelConfig, batch_size: int) -> float:
    """Return the floating-point operations of one batch without recompute, by `formula_of`."""
    return Workload.of(model, gpus=1, batch_size=batch_size, precision="bfloat16").flops(recompute=False)


def formula_of(model: ModelConfig) -> str:
    return model.flops_formula(recompute=False)


def speed(context: Context, config: TrainConfig, seconds: Sequence[float]) -> dict[str, Any]:
    """Return the fields of a row that say how fast a contender trained `config`, from the seconds of its batches."""
    if not seconds:
        return {}
    spread = middle_half(seconds)
    rate = flops_of(config.model, config.batch_size) / spread.median / 1e12
    peak = None if context.peak is None else context.peak.tflops
    return {
        "seconds": spread.median,
        "seconds_low": spread.low,
        "seconds_high": spread.high,
        "batch_times_s": list(seconds),
        "units_per_s": config.batch_size * config.model.units_per_sample / spread.median,
        "unit": config.model.sample_unit,
        "tflops": rate,
        "formula": formula_of(config.model),
        "pct_peak": None if peak is None else 100 * rate / peak,
        "parameters": config.model.parameters,
        "config": config.model_dump(mode="json"),
    }


def agreement(losses: Sequence[float], reference: Sequence[float], *, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Return the fields of a row that say how near its losses are to the reference's; with a failure where they differ,
    or where there is nothing to compare."""
    worst = difference(losses, reference)
    fields: dict[str, Any] = {
        "losses": list(losses),
        "loss_difference": worst if worst is None or isfinite(worst) else None,
        "tolerance": tolerance,
    }
    if worst is None:
        return fields | {"failure": _apart("there are no losses to compare")}
    if worst > tolerance:
        return fields | {"failure": _apart(f"losses differ by {worst:.1e}, more than {tolerance:.0e}")}
    return fields


def _apart(detail: str) -> Failure:
    return Failure(cause="not-comparable", detail=detail)


def steady(seconds: Sequence[float], warmup: int) -> list[float]:
    """Return the batches after those that warm up; the last one where there are none."""
    return list(seconds[warmup:] or seconds[-1:])
