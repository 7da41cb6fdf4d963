"""Cuts a chain of layers into stages of nearly equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from axonn.errors import GridError


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Contiguous ranges of layers, one per stage and none empty, whose largest total cost is the least possible.

    Among equally good cuts the one with the smallest sum of squared stage costs is taken, so no stage is left fuller
    than it must be. Raises `GridError` when there are more stages than layers.
    """
    layers = len(costs)
    if stages > layers:
        raise GridError(f"{stages} stages need at least {stages} layers, the model has {layers}; lower G_inter")
    total = (0.0, *accumulate(costs))

    @cache
    def best(first: int, left: int) -> tuple[float, float, int]:
        """(largest stage cost, sum of squares, end of the first stage) of the layers from `first` on."""
        if left == 1:
            cost = total[layers] - total[first]
            return cost, cost * cost, layers
        options = []
        for end in range(first + 1, layers - left + 2):
            cost = total[end] - total[first]
            worst, squares, _ = best(end, left - 1)
            options.append((max(cost, worst), cost * cost + squares, end))
        return min(options)

    ranges = []
    first = 0
    for left in range(stages, 0, -1):
        end = best(first, left)[2]
        ranges.append(range(first, end))
        first = end
    return ranges
