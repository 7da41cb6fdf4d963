"""Which layout each value gets: that with which the least is sent to lay values out another way.

Layers are cut along as many axes as their features allow. What remains free is their orientation, and with it how the
values between them lie. Every operation is a variable, its options the layouts it can have; where a value comes to be
used in another layout than its own, the elements that a rank receives in forward and backward are the cost. Among the
cheapest, that is taken in which the layers' own collectives are smallest.
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
from axonn.autoparallel.redistribute_modules import received, sent
from axonn.errors import ConfigError
from axonn.tensor.context import TensorContext

_ONE = 1e-3
"""What any other layout costs, in elements, so that of equally good plans that with the fewest is taken."""

_HELD = 1e-3
"""What an element of an activation on a rank counts against one that a layer sends."""


class LayoutPlan(NamedTuple):
    """The option of each node, and what led to it. `exact`: whether no other plan sends less."""

    options: dict[fx.Node, Option]
    operations: dict[fx.Node, Operation]
    gradients: set[fx.Node]
    """Values that depend on trained parameters."""
    rows: Rows
    exact: bool


def assign(root: fx.GraphModule, context: TensorContext, *, whole_outputs: bool) -> LayoutPlan:
    """Choose the layouts of a traced module. Raises `ConfigError` when the holders of one parameter cannot agree."""
    operations = operations_of(root)
    gradients = needing_gradients(root, operations)
    rows = follow_rows(root.graph, operations)
    options = options_of(root, operations, context, gradients, whole_outputs=whole_outputs)
    problem = _Problem(root, operations, options, gradients, rows, context)
    found = minimise(problem.single, problem.pairs)
    if not np.isfinite(problem.total(found.choices)):
        raise ConfigError("no layout suits all modules that share a parameter; untie them, or leave one of them out")
    chosen = {node: problem.hubs[node][choice][0] for node, choice in zip(options, found.choices, strict=True)}
    return LayoutPlan(chosen, operations, gradients, rows, found.exact)


class _Problem:
    """Costs of single nodes and of pairs. A choice of a node is one of its `hubs`: an option, and perhaps one more
    layout in which its value is also made, for those users that share it."""

    def __init__(
        self,
        root: fx.GraphModule,
        operations: Mapping[fx.Node, Operation],
        options: Mapping[fx.Node, Sequence[Option]],
        gradients: set[fx.Node],
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
        """What they cost together."""
        pairs = sum(costs[choices[i], choices[j]] for (i, j), costs in self.pairs.items())
        return float(pairs + sum(costs[choice] for costs, choice in zip(self.single, choices, strict=True)))

    def _inputs(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return self._operations[node].inputs if node in self._operations else ()

    def _hubs(self, node: fx.Node) -> list[tuple[Option, Wanted | str]]:
        plain: list[tuple[Option, Wanted | str]] = [(option, "none") for option in self._options[node]]
        if len(self._users[node]) < 2 or not isinstance(node.meta["val"], torch.Tensor):
            return plain
        wanted = dict.fromkeys(w for user in self._users[node] for w in self._wanted(node, user))
        more = [(o, w) for o in self._options[node] for w in wanted if w != o.output]
        return plain + [(o, w) for o, w in more if np.isfinite(self._transfer(node, o.output, w))]

    def _wanted(self, source: fx.Node, user: fx.Node) -> list[Wanted]:
        return [
            w for o in self._options[user] for i, w in zip(self._inputs(user), o.wanted, strict=True) if i is source
        ]

    def _single(self) -> list[Costs]:
        own = [
            np.array([option.cost + _HELD * self._held(node, option.output) for option, _ in hubs])
            for node, hubs in self.hubs.items()
        ]
        scale = 0.5 / (1 + sum(costs.max() for costs in own))
        return [
            costs * scale + [self._extra(node, hub) for hub in hubs]
            for costs, (node, hubs) in zip(own, self.hubs.items(), strict=True)
        ]

    def _extra(self, node: fx.Node, hub: tuple[Option, Wanted | str]) -> float:
        option, more = hub
        return 0.0 if isinstance(more, str) else self._transfer(node, option.output, more)

    def _held(self, node: fx.Node, state: State) -> float:
        """Elements of its value on a rank, and one for each segment."""
        size = elements(node) if node.op != "output" else 0
        return float(size) if state is None else size / self._context.extent(state.axis) + len(state.form.segments)

    def _edge(self, source: fx.Node, user: fx.Node) -> Costs:
        """What `user` pays to get `source` as it wants it, from what there is of it."""
        positions = [i for i, n in enumerate(self._inputs(user)) if n is source]
        wanted = [tuple(dict.fromkeys(o.wanted[i] for i in positions)) for o, _ in self.hubs[user]]
        kinds = {w: i for i, w in enumerate(dict.fromkeys(wanted))}
        costs = np.zeros((len(self.hubs[source]), len(kinds)))
        for row, (option, more) in enumerate(self.hubs[source]):
            for all_wanted, column in kinds.items():
                costs[row, column] = sum(
                    0.0 if w == more else self._transfer(source, option.output, w) for w in all_wanted
                )
        return costs[:, [kinds[w] for w in wanted]]

    def _transfer(self, node: fx.Node, have: State, want: Wanted) -> float:
        if have == want:
            return 0.0
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            # A tuple is taken apart before anything else, so it cannot be laid out another way.
            return float("inf")
        rows = self._rows.forms.get(node)
        if rows is not None and any(isinstance(s, Shard) and s.form.dim == rows.dim for s in (have, want)):
            # The segments of that dim would depend on the number of rows.
            return float("inf")
        forward, backward = sent(value.numel(), value.is_floating_point(), have, want, self._context)
        calls = [*forward, *(backward if node in self._gradients else ())]
        return _ONE + sum(received(call, self._context) for call in calls)

    def _same_parameters(self, first: fx.Node, second: fx.Node) -> Costs:
        one, two = (
            [keys(self._root, self._operations.get(n), n, option) for option, _ in self.hubs[n]]
            for n in (first, second)
        )
        agree = [[all(a[p] == b[p] for p in a.keys() & b.keys()) for b in two] for a in one]
        return np.where(np.array(agree), 0.0, np.inf)

    def _add(self, first: fx.Node, second: fx.Node, costs: Costs) -> None:
        pair = self._number[first], self._number[second]
        self.pairs[pair] = self.pairs[pair] + costs if pair in self.pairs else costs
