"""Search for the cheapest assignment of choices to the nodes of a graph with costs of single nodes and of pairs.

Variable elimination (Bertelè & Brioschi, Nonserial Dynamic Programming, 1972): one variable after the other is replaced
by a table of its best choice, given those of its neighbours. A chain takes time proportional to its length; residual
paths, branches and the nested skips of a U-Net also have few neighbours at a time, so the result is exact. Where a
table would become too large, its best-connected variable is fixed first, and the result is marked as not exact.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.float64]
_LARGEST = 1 << 21
"""Most entries of a table."""


class Assignment(NamedTuple):
    """Result of the search: the choice of each variable. `exact`: True if there is no cheaper assignment."""

    choices: list[int]
    exact: bool


class _Factor(NamedTuple):
    scope: tuple[int, ...]
    costs: Costs


def minimise(single: Sequence[Costs], pairs: Mapping[tuple[int, int], Costs], *, largest: int = _LARGEST) -> Assignment:
    """Return the choices with the least sum of `single[i][choice of i]` and `pairs[i, j][choice of i, choice of j]`.

    Infinite costs forbid a choice. Of equally cheap choices the first is taken. No table gets more than `largest`
    entries.
    """
    problem = _Problem(single, pairs)
    exact = True
    decided: list[tuple[int, tuple[int, ...], NDArray[np.intp]]] = []
    while (variable := problem.next()) is not None:
        scope = sorted(problem.neighbours[variable])
        while problem.entries(variable) > largest and scope:
            exact = False
            fixed = max(scope, key=lambda v: len(problem.neighbours[v]))
            decided.append((fixed, (), problem.fix(fixed)))
            scope = sorted(problem.neighbours[variable])
        decided.append((variable, tuple(scope), problem.eliminate(variable, tuple(scope))))
    choices = [0] * len(single)
    for variable, others, best in reversed(decided):
        choices[variable] = int(best[tuple(choices[v] for v in others)])
    return Assignment(choices, exact)


class _Problem:
    def __init__(self, single: Sequence[Costs], pairs: Mapping[tuple[int, int], Costs]) -> None:
        self.sizes = [len(costs) for costs in single]
        self.neighbours: dict[int, set[int]] = {i: set() for i in range(len(single))}
        self._factors: dict[int, list[_Factor]] = {i: [] for i in range(len(single))}
        for i, costs in enumerate(single):
            self._add(_Factor((i,), costs))
        for scope, costs in pairs.items():
            self._add(_Factor(scope, costs))
        self._heap = [(self.entries(i), i) for i in range(len(single))]
        heapq.heapify(self._heap)

    def next(self) -> int | None:
        """Return the variable whose elimination makes the smallest table; None when all are eliminated."""
        while self._heap:
            entries, variable = heapq.heappop(self._heap)
            if variable not in self.neighbours:
                continue
            now = self.entries(variable)
            if now <= entries:
                return variable
            heapq.heappush(self._heap, (now, variable))
        return None

    def entries(self, variable: int) -> int:
        return prod(self.sizes[v] for v in self.neighbours[variable]) * self.sizes[variable]

    def eliminate(self, variable: int, scope: tuple[int, ...]) -> NDArray[np.intp]:
        """Eliminate `variable`; return its best choice for each choice of the variables in `scope`."""
        total = np.zeros([self.sizes[v] for v in (*scope, variable)])
        for factor in self._factors[variable]:
            total += _aligned(factor, (*scope, variable))
        self._remove(variable)
        if scope:
            self._add(_Factor(scope, total.min(-1)))
            for v in scope:
                heapq.heappush(self._heap, (self.entries(v), v))
        best: NDArray[np.intp] = total.argmin(-1)
        return best

    def fix(self, variable: int) -> NDArray[np.intp]:
        """Fix `variable` to the choice that is cheapest if each of its factors may choose all others freely."""
        total = np.zeros(self.sizes[variable])
        for factor in self._factors[variable]:
            others = tuple(i for i, v in enumerate(factor.scope) if v != variable)
            total += np.min(factor.costs, axis=others)
        best = total.argmin()
        for factor in list(self._factors[variable]):
            if len(factor.scope) > 1:
                dim = factor.scope.index(variable)
                remaining = (*factor.scope[:dim], *factor.scope[dim + 1 :])
                self._add(_Factor(remaining, np.take(factor.costs, [int(best)], axis=dim).squeeze(dim)))
        neighbours = list(self.neighbours[variable])
        self._remove(variable)
        for v in neighbours:
            heapq.heappush(self._heap, (self.entries(v), v))
        return np.asarray(best)

    def _add(self, factor: _Factor) -> None:
        for v in factor.scope:
            self._factors[v].append(factor)
            self.neighbours[v].update(u for u in factor.scope if u != v)

    def _remove(self, variable: int) -> None:
        for factor in self._factors.pop(variable):
            for v in factor.scope:
                if v != variable:
                    self._factors[v] = [f for f in self._factors[v] if f is not factor]
        for v in self.neighbours.pop(variable):
            self.neighbours[v] = {u for f in self._factors[v] for u in f.scope if u != v}


def _aligned(factor: _Factor, scope: tuple[int, ...]) -> Costs:
    """Return its costs with one dim per variable of `scope`, of size 1 for variables that it does not depend on."""
    order = sorted(range(len(factor.scope)), key=lambda i: scope.index(factor.scope[i]))
    costs = factor.costs.transpose(order)
    shape = [1] * len(scope)
    for i, size in zip(order, costs.shape, strict=True):
        shape[scope.index(factor.scope[i])] = size
    return costs.reshape(shape)
