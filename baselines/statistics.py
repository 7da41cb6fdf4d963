"""Statistics of a comparison: quartiles, and the median of paired ratios with an interval that assumes no
distribution."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median, quantiles
from typing import NamedTuple

CONFIDENCE = 0.95
LEAST_PAIRS = 6
"""Fewest values of which an interval holds the median with this confidence; of fewer, least and most are given
instead."""
HALF_WIDTH = 0.03
"""Half width of a ratio's interval, relative to the ratio, below which no more rounds are needed."""


class Spread(NamedTuple):
    """A median with an interval around it."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half width of the interval, relative to the median."""
        return (self.high - self.low) / 2 / self.median


def paired_ratios(under: Sequence[float], over: Sequence[float]) -> list[float]:
    """Return the ratios of `under` to `over`, round by round."""
    return [a / b for a, b in zip(under, over, strict=True)]


def middle_half(values: Sequence[float]) -> Spread:
    """Return median and quartiles; of fewer than 4 values least and most instead."""
    if len(values) < 4:
        return Spread(median(values), min(values), max(values))
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), low, high)


def median_interval(values: Sequence[float]) -> Spread:
    """Return the median, and the narrowest interval between the k-th least and the k-th largest value that holds the
    true median with `CONFIDENCE` (the inverted sign test); least and most where the values are too few for that, as up
    to 5."""
    ordered = sorted(values)
    n = len(ordered)
    k = 0
    # The median lies outside of [k-th least, k-th largest] when fewer than k values fall on one side of it.
    while 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n <= 1 - CONFIDENCE:
        k += 1
    index = max(k - 1, 0)
    return Spread(median(ordered), ordered[index], ordered[n - 1 - index])
