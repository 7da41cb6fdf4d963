"""Partition of a chain of layers into stages, or into the chunks of stages, of nearly equal cost."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cache, partial
from itertools import accumulate, combinations, pairwise, product
from math import inf

from axonn.errors import GridError
from axonn.schedules import ChunkLayout

_FAR, _FEW = 4, 12
"""Layers by which the local search moves a cut, with at most `_FEW` virtual stages; with more, one layer."""


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Return contiguous ranges of layers, one per stage and none empty, with the least possible largest stage cost.

    Among equally good cuts the one with the smallest sum of squared stage costs is taken, so that no stage is fuller
    than it must be. Raises `GridError` when there are more stages than layers.
    """
    layers = len(costs)
    if stages > layers:
        raise GridError(f"{stages} stages are more than the {layers} into which this model can be cut; lower G_inter")
    total = (0.0, *accumulate(costs))

    def cost(first: int, end: int) -> float:
        return total[end] - total[first]

    def enough(bound: float) -> bool:
        """Return True if stages filled one after the other up to `bound` hold all layers."""
        first = 0
        for _ in range(stages):
            # The largest end within the bound; sums grow with the end.
            end = bisect_right(total, bound, lo=first, key=partial(_since, total[first])) - 1
            if end == layers:
                return True
            first = end
        return False

    costs_of_stages = sorted({cost(first, end) for first in range(layers) for end in range(first + 1, layers + 1)})
    bound = costs_of_stages[bisect_left(costs_of_stages, True, key=enough)]

    @cache
    def best(first: int, left: int) -> tuple[float, int]:
        """Return (least sum of squares, end of the first stage) for the layers from `first` on within the bound."""
        if left == 1:
            return (cost(first, layers) ** 2 if cost(first, layers) <= bound else inf), layers
        least = inf, first + 1
        for end in range(first + 1, layers - left + 2):
            if cost(first, end) > bound:
                break
            least = min(least, (cost(first, end) ** 2 + best(end, left - 1)[0], end))
        return least

    ranges = []
    first = 0
    for left in range(stages, 0, -1):
        end = best(first, left)[1]
        ranges.append(range(first, end))
        first = end
    return ranges


def _since(before: float, total: float) -> float:
    return total - before


def partition_chunks(costs: Sequence[float], layout: ChunkLayout) -> list[range]:
    """Return contiguous ranges of layers, one per virtual stage and none empty, that minimise the largest *stage* cost.

    The total cost of a stage bounds the batch time, so its chunks may differ as long as the stages do not. Starts from
    equal chunks and moves cuts, one or two at a time, while that improves (largest stage, spread of the stages, spread
    of the chunks), to a local optimum; with one chunk per stage the start is the optimum. Raises `GridError` when there
    are too few layers.
    """
    spans = partition(costs, layout.virtual_stages)
    if layout.chunks == 1 or layout.stages == 1:
        return spans
    total = (0.0, *accumulate(costs))
    stage_of = [layout.place(v)[0] for v in range(layout.virtual_stages)]
    # Sums of floats differ in their last digits by the order of addition; equal cuts must compare equal.
    resolution = (total[-1] or 1.0) * 1e-9

    def value(cuts: Sequence[int]) -> tuple[int, int, int]:
        chunks = [total[b] - total[a] for a, b in pairwise(cuts)]
        stages = [0.0] * layout.stages
        for stage, cost in zip(stage_of, chunks, strict=True):
            stages[stage] += cost
        spread = (sum(s * s for s in stages), sum(c * c for c in chunks))
        return (
            round(max(stages) / resolution),
            round(spread[0] / resolution**2 * 1e-9),
            round(spread[1] / resolution**2 * 1e-9),
        )

    cuts = [0, *(span.stop for span in spans)]
    best = value(cuts)
    reach = _FAR if layout.virtual_stages <= _FEW else 1
    moves = [(cut, by) for cut, by in product(range(1, len(cuts) - 1), range(-reach, reach + 1)) if by]
    steps = [(m,) for m in moves] + list(combinations(moves, 2))
    while True:
        for step in steps:
            moved = list(cuts)
            for cut, by in step:
                moved[cut] += by
            if (
                all(moved[cut - 1] < moved[cut] < moved[cut + 1] for cut, _ in step)
                and (moved_value := value(moved)) < best
            ):
                best, cuts = moved_value, moved
                break
        else:
            return [range(a, b) for a, b in pairwise(cuts)]
