"""A small set of configurations in which every pair of values of two parameters occurs.

Defects that need three particular values at once are rare, and the full product takes too long for every change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]
Pair = tuple[tuple[str, int], tuple[str, int]]


def full_product(
    parameters: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Every allowed row, with one value per parameter."""
    return [row for numbers in _numbers(parameters) if allowed(row := _values(parameters, numbers))]


def pairwise_cover(
    parameters: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Rows with one value per parameter such that every pair that an allowed row can have occurs in one of them.

    Greedy and deterministic: the next row is the allowed one that brings the most new pairs; among equals the one whose
    values were used least, then the first.
    """
    candidates = [row for row in _numbers(parameters) if allowed(_values(parameters, row))]
    missing = {pair for row in candidates for pair in pairs_of(row)}
    used: Counter[tuple[str, int]] = Counter()
    rows = []
    while missing:
        best = max(candidates, key=lambda row: (len(pairs_of(row) & missing), -sum(used[i] for i in row.items())))
        missing -= pairs_of(best)
        used.update(best.items())
        rows.append(_values(parameters, best))
    return rows


def pairs_of(row: Mapping[str, int]) -> set[Pair]:
    """All pairs ((parameter, number of its value), (another parameter, number of its value)) of a row."""
    return set(combinations(row.items(), 2))


def _numbers(parameters: Mapping[str, Sequence[Any]]) -> list[dict[str, int]]:
    ranges = (range(len(values)) for values in parameters.values())
    return [dict(zip(parameters, row, strict=True)) for row in product(*ranges)]


def _values(parameters: Mapping[str, Sequence[Any]], numbers: Mapping[str, int]) -> Row:
    return {name: parameters[name][number] for name, number in numbers.items()}
