"""The predictor to beat: every GPU runs at one constant rate, whatever the strategy."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from itertools import accumulate

from axonn.errors import ConfigError

Batch = tuple[float, int, float]
"""FLOPs, GPUs and seconds of one measured batch."""


def naive_constant(batches: Sequence[Batch]) -> float:
    """FLOP/s per GPU that fits `batches` best: least mean |error| over them.

    The error of `naive_predict` is quoted beside the model's; it is fitted on the very points that it predicts.
    """
    return naive_constants(batches, [None] * len(batches))[0]


def naive_constants(batches: Sequence[Batch], groups: Sequence[Hashable]) -> tuple[float, dict[Hashable, float]]:
    """FLOP/s per GPU that fits all `batches` best, and for each of `groups` (one name per batch) the rate that fits
    those of the other groups best; a group has none where there is no other.

    A rate x predicts a batch whose own rate is r with the relative error |r / x - 1| = r |1/x - 1/r|, so that the best
    1/x is the median of the 1/r weighted by r: one sort finds it, also of what is left without a group.
    """
    if not batches:
        raise ConfigError("the naive predictor needs at least one batch to be fitted on")
    rates: list[float] = [flops / gpus / seconds for flops, gpus, seconds in batches]
    order = sorted(range(len(rates)), key=rates.__getitem__, reverse=True)
    below = list(accumulate((rates[i] for i in order), initial=0.0))
    of_group: dict[Hashable, list[int]] = {}
    for place, i in enumerate(order):
        of_group.setdefault(groups[i], []).append(place)

    def median(without: Sequence[int] = ()) -> float:
        """Of all places in the order but those `without`, which ascend."""
        own = list(accumulate((rates[order[place]] for place in without), initial=0.0))

        def weight(end: int) -> float:
            """Of the first `end` places that count."""
            return below[end] - own[bisect_right(without, end - 1)]

        half = weight(len(order)) / 2
        first, last = 0, len(order) - 1
        while first < last:
            middle = (first + last) // 2
            if weight(middle + 1) >= half:
                last = middle
            else:
                first = middle + 1
        excluded = set(without)
        # Where sums are rounded, the half may seem to be reached at a place that does not count.
        places = (*range(first, len(order)), *reversed(range(first)))
        chosen: int = next(place for place in places if place not in excluded)
        return rates[order[chosen]]

    held_out = {name: median(own) for name, own in of_group.items() if len(own) < len(order)}
    return median(), held_out


def naive_predict(*, flops: float, gpus: int, flops_per_s: float) -> float:
    """Seconds of a batch of `flops` if every GPU ran at a constant `flops_per_s`, whatever the strategy."""
    return flops / gpus / flops_per_s
