"""Baseline predictor: every GPU runs at one constant rate, whatever the strategy."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from itertools import accumulate

from axonn.errors import ConfigError

Batch = tuple[float, int, float]
"""FLOPs, GPUs and seconds of one measured batch."""


def naive_constant(batches: Sequence[Batch]) -> float:
    """Return the FLOP/s per GPU that fits `batches` best, by mean |error|.

    The error of `naive_predict` is reported next to the model's; it is in-sample, on the points of the fit.
    """
    return naive_constants(batches, [None] * len(batches))[0]


def naive_constants(batches: Sequence[Batch], groups: Sequence[Hashable]) -> tuple[float, dict[Hashable, float]]:
    """Return the FLOP/s per GPU that fits `batches` best, and for each group the best fit to the others.

    `groups`: the group of each batch. A group has no rate if it is the only one. A rate x predicts a batch of rate r
    with the relative error |r / x - 1| = r |1/x - 1/r|, so the best 1/x is the median of the 1/r weighted by r. One
    sort serves all groups.
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
        """Return the weighted median over all positions in the order except `without`, which ascend."""
        excluded_below = list(accumulate((rates[order[place]] for place in without), initial=0.0))

        def weight(end: int) -> float:
            """Return the total weight of the included positions before `end`."""
            return below[end] - excluded_below[bisect_right(without, end - 1)]

        half = weight(len(order)) / 2
        first, last = 0, len(order) - 1
        while first < last:
            middle = (first + last) // 2
            if weight(middle + 1) >= half:
                last = middle
            else:
                first = middle + 1
        excluded = set(without)
        # With rounded sums the half may appear to be reached at an excluded position.
        places = (*range(first, len(order)), *reversed(range(first)))
        chosen: int = next(place for place in places if place not in excluded)
        return rates[order[chosen]]

    held_out = {name: median(places) for name, places in of_group.items() if len(places) < len(order)}
    return median(), held_out


def naive_predict(*, flops: float, gpus: int, flops_per_s: float) -> float:
    """Return the seconds of a batch of `flops` if every GPU runs at a constant `flops_per_s`, whatever the strategy."""
    return flops / gpus / flops_per_s
