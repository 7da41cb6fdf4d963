"""Analysis of whether the rows of a batch are independent, so that they can be computed in sub-shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import fx

from axonn.autoparallel.layouts.op_rules import Expand, Operation
from axonn.autoparallel.layouts.op_table import is_tensor
from axonn.autoparallel.layouts.shardings import Form
from axonn.autoparallel.tracing.op_names import op_name


class Rows(NamedTuple):
    """Rows of a batch in a graph.

    `forms`: the dim of the rows in each value; None for values without rows, missing if unknown. `problem`: why rows
    cannot be computed in sub-shards; empty if they can. `inputs`: names of the arguments with rows.
    """

    forms: dict[fx.Node, Form | None]
    problem: str
    inputs: frozenset[str]


def follow_rows(graph: fx.Graph, operations: Mapping[fx.Node, Operation]) -> Rows:
    """Follow dim 0 of the inputs through the graph. The number of rows is that of the first input."""
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
    """Return the form of the rows in the output, or why it is unknown."""
    node, inputs = operation.node, operation.inputs
    if any(i not in forms for i in inputs):
        return None, "its input has rows that are not followed"
    input_forms = tuple(forms[i] for i in inputs)
    position = next((i for i, form in enumerate(input_forms) if form is not None), None)
    if position is None:
        return _spread(operation, forms), ""
    form = input_forms[position]
    assert form is not None
    row_rules = operation.for_rows
    for rule in row_rules.carry(position, form):
        if rule.inputs == input_forms:
            if row_rules.fixes(rule.output.dim):
                return None, f"the number of rows is written in the code: {node.format_node()}"
            return rule.output, ""
    return None, f"rows are mixed: {row_rules.why_not(position, form)}"


def _spread(operation: Operation, forms: Mapping[fx.Node, Form | None]) -> Form | None:
    """Return the rows of a value that is expanded to the number of rows; None if it is not."""
    if not isinstance(operation, Expand):
        return None
    for dim, size in enumerate(operation.sizes):
        if isinstance(size, fx.Node):
            rows = _counted(size, forms)
            if rows is not None:
                return Form(dim, rows.segments)
    return None


def _counted(size: fx.Node, forms: Mapping[fx.Node, Form | None]) -> Form | None:
    """Return the form of the rows whose number `size` is; None if it is another size."""
    name = op_name(size)
    if name == "getitem" and isinstance(size.args[0], fx.Node) and op_name(size.args[0]) in ("getattr", "size"):
        source, dim = size.args[0].args[0], size.args[1]
    elif name == "size" and len(size.args) == 2:
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
