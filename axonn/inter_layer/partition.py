"""Cuts a chain of layers into stages of nearly equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from math import inf

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

    def cost(first: int, end: int) -> float:
        return total[end] - total[first]

    @cache
    def largest(first: int, left: int) -> float:
        """Least possible cost of the largest of the `left` stages that the layers from `first` on are cut into."""
        if left == 1:
            return cost(first, layers)
        return min(max(cost(first, end), largest(end, left - 1)) for end in range(first + 1, layers - left + 2))

    bound = largest(0, stages)

    @cache
    def best(first: int, left: int) -> tuple[float, int]:
        """(least sum of squares, end of the first stage) of the layers from `first` on, no stage above the bound."""
        ends = (layers,) if left == 1 else range(first + 1, layers - left + 2)
        return min(
            (cost(first, end) ** 2 + (best(end, left - 1)[0] if left > 1 else 0.0), end)
            if cost(first, end) <= bound
            else (inf, end)
            for end in ends
        )

    ranges = []
    first = 0
    for left in range(stages, 0, -1):
        end = best(first, left)[1]
        ranges.append(range(first, end))
        first = end
    return ranges
