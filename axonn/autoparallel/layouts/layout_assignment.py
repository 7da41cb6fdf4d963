"""Assignment of layouts to the values of a graph, such that redistributions send the least.

Layers are cut along as many axes as their features allow. Their orientation remains free, and with it the layouts of
the values between them. Every operation is a variable whose options are the layouts it can have; where a value is used
in another layout than its own, the cost is the number of elements that a rank receives in forward and backward. Among
the cheapest assignments, the one with the smallest collectives of the layers themselves is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import fx

from axonn.autoparallel.layouts.batch_independence import Rows, follow_rows
from axonn.autoparallel.layouts.layout_choices import (
    Option,
    holders,
    keys,
    needing_gradients,
    operations_of,
    options_of,
)
from axonn.autoparallel.layouts.min_cost_search import Costs, minimise
from axonn.autoparallel.layouts.op_rules import Operation
from axonn.autoparallel.layouts.op_table import elements
from axonn.autoparallel.layouts.shardings import Shard, State, Wanted
from axonn.autoparallel.redistribute_modules import elements_received, redistribution_collectives
from axonn.errors import ConfigError
from axonn.tensor.context import TensorContext

_REDISTRIBUTION_COST = 1e-3
"""Cost of any redistribution, in elements, so that of equally good plans the one with the fewest is taken."""

_HELD_WEIGHT = 1e-3
"""Weight of an element of an activation on a rank, relative to one that a layer sends."""


class LayoutPlan(NamedTuple):
    """Layouts chosen for a graph, and the analysis behind them. `exact`: True if no other plan sends less."""

    options: dict[fx.Node, Option]
    operations: dict[fx.Node, Operation]
    gradients: set[fx.Node]
    """Values that depend on trained parameters, and so have gradients."""
    rows: Rows
    exact: bool


def assign_layouts(root: fx.GraphModule, context: TensorContext, *, whole_outputs: bool) -> LayoutPlan:
    """Choose the layouts of a traced module. Raises `ConfigError` when the holders of one parameter cannot agree."""
    operations = operations_of(root)
    gradients = needing_gradients(root, operations)
    rows = follow_rows(root.graph, operations)
    options = options_of(root, operations, context, gradients, whole_outputs=whole_outputs)
    problem = _Problem(root, operations, options, gradients, rows=rows, context=context)
    assignment = minimise(problem.single, problem.pairs)
    if not np.isfinite(problem.total(assignment.choices)):
        raise ConfigError("no layout suits all modules that share a parameter; untie them, or leave one of them out")
    chosen = {node: problem.hubs[node][choice][0] for node, choice in zip(options, assignment.choices, strict=True)}
    return LayoutPlan(chosen, operations, gradients, rows, assignment.exact)


class _Problem:
    """Costs of single nodes and of pairs of nodes, for `minimise`.

    A choice of a node is one of its `hubs`: an option, and possibly one more layout in which its value is also made,
    shared by several users.
    """

    def __init__(
        self,
        root: fx.GraphModule,
        operations: Mapping[fx.Node, Operation],
        options: Mapping[fx.Node, Sequence[Option]],
        gradients: set[fx.Node],
        *,
        rows: Rows,
        context: TensorContext,
    ) -> None:
        self._root = root
        self._operations = operations
        self._options = options
        self._gradients = gradients
        self._rows = rows
        self._context = context
        self._number = {node: i for i, node in enumerate(options)}
        self._users: dict[fx.Node, list[fx.Node]] = {node: [] for node in options}
        for node in options:
            for source in dict.fromkeys(self._inputs(node)):
                self._users[source].append(node)
        self.hubs: dict[fx.Node, list[tuple[Option, Wanted | str]]] = {node: self._hubs(node) for node in options}
        self.single = self._single()
        self.pairs: dict[tuple[int, int], Costs] = {}
        for node in options:
            for source in dict.fromkeys(self._inputs(node)):
                self._add(source, node, self._edge(source, node))
        for group in holders(root, options):
            for first, second in pairwise(dict.fromkeys(group)):
                self._add(first, second, self._same_parameters(first, second))

    def total(self, choices: Sequence[int]) -> float:
        """Return the total cost of `choices`."""
        pairs = sum(costs[choices[i], choices[j]] for (i, j), costs in self.pairs.items())
        return float(pairs + sum(costs[choice] for costs, choice in zip(self.single, choices, strict=True)))

    def _inputs(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return self._operations[node].inputs if node in self._operations else ()

    def _hubs(self, node: fx.Node) -> list[tuple[Option, Wanted | str]]:
        plain: list[tuple[Option, Wanted | str]] = [(option, "none") for option in self._options[node]]
        if len(self._users[node]) < 2 or not isinstance(node.meta["val"], torch.Tensor):
            return plain
        wanted = dict.fromkeys(w for user in self._users[node] for w in self._wanted(node, user))
        extended = [(o, w) for o in self._options[node] for w in wanted if w != o.output]
        return plain + [(o, w) for o, w in extended if np.isfinite(self._transfer(node, o.output, w))]

    def _wanted(self, source: fx.Node, user: fx.Node) -> list[Wanted]:
        return [
            w for o in self._options[user] for i, w in zip(self._inputs(user), o.wanted, strict=True) if i is source
        ]

    def _single(self) -> list[Costs]:
        layer_costs = [
            np.array([option.cost + _HELD_WEIGHT * self._held(node, option.output) for option, _ in hubs])
            for node, hubs in self.hubs.items()
        ]
        scale = 0.5 / (1 + sum(costs.max() for costs in layer_costs))
        return [
            costs * scale + [self._extra(node, hub) for hub in hubs]
            for costs, (node, hubs) in zip(layer_costs, self.hubs.items(), strict=True)
        ]

    def _extra(self, node: fx.Node, hub: tuple[Option, Wanted | str]) -> float:
        option, extra_layout = hub
        return 0.0 if isinstance(extra_layout, str) else self._transfer(node, option.output, extra_layout)

    def _held(self, node: fx.Node, state: State) -> float:
        """Return the elements of its value on a rank, plus one per segment."""
        size = elements(node) if node.op != "output" else 0
        return float(size) if state is None else size / self._context.extent(state.axis) + len(state.form.segments)

    def _edge(self, source: fx.Node, user: fx.Node) -> Costs:
        """Return the costs for `user` to get `source` in the layouts it wants, by the choices of both."""
        positions = [i for i, n in enumerate(self._inputs(user)) if n is source]
        wanted = [tuple(dict.fromkeys(o.wanted[i] for i in positions)) for o, _ in self.hubs[user]]
        columns = {w: i for i, w in enumerate(dict.fromkeys(wanted))}
        costs = np.zeros((len(self.hubs[source]), len(columns)))
        for row, (option, extra_layout) in enumerate(self.hubs[source]):
            for all_wanted, column in columns.items():
                costs[row, column] = sum(
                    0.0 if w == extra_layout else self._transfer(source, option.output, w) for w in all_wanted
                )
        return costs[:, [columns[w] for w in wanted]]

    def _transfer(self, node: fx.Node, source: State, target: Wanted) -> float:
        if source == target:
            return 0.0
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            # A tuple is unpacked before any other use, so it cannot be redistributed.
            return float("inf")
        rows = self._rows.forms.get(node)
        if rows is not None and any(isinstance(s, Shard) and s.form.dim == rows.dim for s in (source, target)):
            # The segments of that dim would depend on the number of rows.
            return float("inf")
        forward, backward = redistribution_collectives(
            value.numel(), value.is_floating_point(), source, target, self._context
        )
        calls = [*forward, *(backward if node in self._gradients else ())]
        return _REDISTRIBUTION_COST + sum(elements_received(call, self._context) for call in calls)

    def _same_parameters(self, first: fx.Node, second: fx.Node) -> Costs:
        first_keys, second_keys = (
            [keys(self._root, self._operations.get(n), n, option) for option, _ in self.hubs[n]]
            for n in (first, second)
        )
        agree = [[all(a[p] == b[p] for p in a.keys() & b.keys()) for b in second_keys] for a in first_keys]
        return np.where(np.array(agree), 0.0, np.inf)

    def _add(self, first: fx.Node, second: fx.Node, costs: Costs) -> None:
        pair = self._number[first], self._number[second]
        self.pairs[pair] = self.pairs[pair] + costs if pair in self.pairs else costs
