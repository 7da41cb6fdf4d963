"""The predictor to beat: every GPU runs at one constant rate, whatever the strategy."""

from __future__ import annotations

from collections.abc import Sequence

from axonn.errors import ConfigError


def naive_constant(batches: Sequence[tuple[float, int, float]]) -> float:
    """FLOP/s per GPU that fits best: `batches` are (FLOPs, GPUs, seconds); least mean |error| over them.

    The error of `naive_predict` is quoted beside the model's; it is fitted on the very points that it predicts.
    """
    if not batches:
        raise ConfigError("the naive predictor needs at least one batch to be fitted on")
    rates = [flops / gpus / seconds for flops, gpus, seconds in batches]

    def error(rate: float) -> float:
        return sum(abs(r / rate - 1) for r in rates)

    return min(rates, key=error)


def naive_predict(*, flops: float, gpus: int, flops_per_s: float) -> float:
    """Seconds of a batch of `flops` if every GPU ran at a constant `flops_per_s`, whatever the strategy."""
    return flops / gpus / flops_per_s
