"""Whether the rows of a batch are independent of each other, so that they can be computed in sub-shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import fx

from axonn.autoparallel.layouts.op_rules import Expand, Operation
from axonn.autoparallel.layouts.op_table import is_tensor
from axonn.autoparallel.layouts.shardings import Form
from axonn.autoparallel.tracing.op_names import kind_of


class Rows(NamedTuple):
    """`forms`: where the rows lie in each value; None where there are none, nothing where that is unknown.
    `problem`: why sub-shards cannot be computed by themselves; empty when they can. `inputs`: arguments with rows."""

    forms: dict[fx.Node, Form | None]
    problem: str
    inputs: frozenset[str]


def follow_rows(graph: fx.Graph, operations: Mapping[fx.Node, Operation]) -> Rows:
    """Follow dim 0 of the inputs through the graph. The rows are as many as the first input has."""
    forms: dict[fx.Node, Form | None] = {}
    problem = ""
    inputs = [n for n in graph.nodes if n.op == "placeholder" and is_tensor(n)]
    count = next((n.meta["val"].shape[0] for n in inputs if n.meta["val"].dim()), 0)
    if count < 2:
        problem = "the example has fewer than two rows"
    for node in graph.nodes:
        if node.op == "placeholder":
            shape = node.meta["val"].shape if is_tensor(node) else ()
            forms[node] = Form(0, (count,)) if shape and shape[0] == count else None
        elif node.op == "get_attr":
            forms[node] = None
        elif node.op == "output":
            problem = problem or _outputs_without(node, forms)
        elif node in operations:
            form, reason = _rows_of(operations[node], forms)
            if reason:
                problem = problem or f"{node.name}: {reason}"
            else:
                forms[node] = form
    names = frozenset(str(n.target) for n in inputs if forms.get(n) is not None)
    return Rows(forms, problem, names)


def _rows_of(operation: Operation, forms: Mapping[fx.Node, Form | None]) -> tuple[Form | None, str]:
    """Where the rows of its output lie, or why that is not known."""
    node, inputs = operation.node, operation.inputs
    if any(i not in forms for i in inputs):
        return None, "its input has rows that are not followed"
    given = tuple(forms[i] for i in inputs)
    position = next((i for i, form in enumerate(given) if form is not None), None)
    if position is None:
        return _spread(operation, forms), ""
    form = given[position]
    assert form is not None
    alike = operation.alike
    for link in alike.carry(position, form):
        if link.inputs == given:
            if alike.fixes(link.output.dim):
                return None, f"the number of rows is written in the code: {node.format_node()}"
            return link.output, ""
    return None, f"rows are mixed: {alike.why_not(position, form)}"


def _spread(operation: Operation, forms: Mapping[fx.Node, Form | None]) -> Form | None:
    """The rows of what is expanded to as many."""
    if not isinstance(operation, Expand):
        return None
    for dim, size in enumerate(operation.sizes):
        if isinstance(size, fx.Node):
            rows = _counted(size, forms)
            if rows is not None:
                return Form(dim, rows.segments)
    return None


def _counted(size: fx.Node, forms: Mapping[fx.Node, Form | None]) -> Form | None:
    """The rows that `size` is the number of."""
    kind = kind_of(size)
    if kind == "getitem" and isinstance(size.args[0], fx.Node) and kind_of(size.args[0]) in ("getattr", "size"):
        source, dim = size.args[0].args[0], size.args[1]
    elif kind == "size" and len(size.args) == 2:
        source, dim = size.args
    else:
        return None
    form = forms.get(source) if isinstance(source, fx.Node) else None
    if form is None or not isinstance(source, fx.Node) or len(form.segments) != 1:
        return None
    return form if isinstance(dim, int) and dim % source.meta["val"].dim() == form.dim else None


def _outputs_without(node: fx.Node, forms: Mapping[fx.Node, Form | None]) -> str:
    for value in node.all_input_nodes:
        form = forms.get(value)
        if value not in forms:
            return f"output {value.name}: its rows are not followed"
        if form is None or form.dim != 0:
            return f"output {value.name} does not have the rows in dim 0"
    return ""
