"""Outline of a module cut by `parallelize`, for the performance model: what it computes, keeps and sends.

Nothing is computed: the module is traced, its layouts are searched as for a run, and each layer becomes a cost of
`axonn.perf`. The graph is a single link, so it has no stages. Known are layers that are cut, norms, embeddings,
redistributions and whole linear layers; all other operations count as elementwise passes over memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import fx, nn

from axonn.autoparallel.layouts.layout_assignment import LayoutPlan, assign_layouts
from axonn.autoparallel.layouts.op_table import elements, is_tensor
from axonn.autoparallel.parallel_report import Report, SentCollective
from axonn.autoparallel.rewrite import Rewriter
from axonn.autoparallel.sharded_layers import LayerLayout, LayerOperation
from axonn.autoparallel.tracing.module_trace import Example, trace
from axonn.distributed.transport import InProcessCollectives, InProcessWorld
from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.perf.layers.kernel_operations import Convolution, Product
from axonn.perf.layers.layer_cost import Exchange, Issued, LayerCost
from axonn.perf.layers.layer_work import work_of
from axonn.perf.layers.local_layers import ActivationCost, WholeLossCost
from axonn.perf.layers.model_outline import ModelOutline, OutlineLink
from axonn.tensor.context import TensorContext

_ONE_RANK = ProcessGrid()


def outline_of_module(module: nn.Module, grid: ProcessGrid, example: Example) -> ModelOutline:
    """Return the outline of `module` on the row and col of `grid`, with its outputs gathered.

    `example`: inputs as for `parallelize`, rows first. Raises `ConfigError` when the module cannot be traced.
    """
    meta = copy.deepcopy(module).to("meta")
    on_meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in _values(example)]
    traced = trace(meta, on_meta)
    tensor = ProcessGrid(row=grid.row, col=grid.col)
    # The context needs collectives, although nothing is sent.
    context = TensorContext(tensor, 0, InProcessCollectives(InProcessWorld(tensor.size), tensor, 0))
    plan = assign_layouts(traced.root, context, whole_outputs=True)
    report = Rewriter(traced.root, meta, plan, context).report
    rows = next(t.shape[0] for t in on_meta if isinstance(t, torch.Tensor))
    parts = dict(_costs(traced.root, plan, report, rows))
    flops = sum(_forward_flops(cost) for cost in parts.values())
    outputs = sum(elements(n) for n in traced.root.graph.nodes if n.op == "output") or 1
    return ModelOutline(
        links=[OutlineLink(name="module", parts=parts, cost=float(flops))],
        loss=WholeLossCost(elements=outputs // rows),
        name=type(module).__name__,
        flops=3.0 * flops,
        flops_recomputing=4.0 * flops,
    )


def _values(example: Example) -> list[object]:
    return list(example.values() if hasattr(example, "values") else example)


def _costs(root: fx.GraphModule, plan: LayoutPlan, report: Report, rows: int) -> Iterator[tuple[str, LayerCost]]:
    """Yield (name, cost) in the order of the graph, each redistribution before its user."""
    pending: dict[str, list[tuple[str, LayerCost]]] = {}
    for number, line in enumerate(report.redistributions):
        redistribution = Issued(
            rows=rows,
            of_forward=tuple(map(_exchange, line.forward)),
            of_backward=tuple(map(_exchange, line.backward)) if line.trained else (),
        )
        pending.setdefault(line.user, []).append((f"redistribute{number}", redistribution))
    for node in root.graph.nodes:
        yield from pending.pop(node.name, [])
        operation, option = plan.operations.get(node), plan.options.get(node)
        if isinstance(operation, LayerOperation) and option is not None and option.choice is not None:
            yield node.name, _layer(operation, option.choice, rows, gradient=operation.inputs[0] in plan.gradients)
        elif node.op in ("call_function", "call_method", "call_module") and operation is not None and is_tensor(node):
            axis = None if option is None or option.output is None else option.output.axis
            yield node.name, ActivationCost(kind="gelu", positions=1, features=elements(node) // rows, axis=axis)
    for unused in pending.values():
        yield from unused


def _exchange(call: SentCollective) -> Exchange:
    if call.kind not in ("all-reduce sum", "all-gather"):
        raise ConfigError(f"{call.kind} is not a collective that the performance model knows")
    return Exchange(call.kind, call.axis, call.elements)


def _layer(operation: LayerOperation, choice: LayerLayout, rows: int, *, gradient: bool) -> LayerCost:
    input_axis, output_axis = (None if state is None else state.axis for state in (choice.input, choice.output))
    return operation.kind.cost(
        operation.module,
        operation.shapes,
        rows=rows,
        axes=(input_axis, output_axis),
        segments=None if choice.output is None else choice.output.form.segments,
        gradient=gradient,
    )


def _forward_flops(cost: LayerCost) -> int:
    """Return the forward FLOPs of one row: those of matrix products and convolutions."""
    return sum(o.flops for o in work_of(cost, _ONE_RANK, 1).forward if isinstance(o, Product | Convolution))
