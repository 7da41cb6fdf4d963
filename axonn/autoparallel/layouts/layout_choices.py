"""Candidate layouts of each node of a graph, found by propagating cuts through it in both directions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import fx, nn

from axonn.autoparallel.layouts.op_rules import Operation
from axonn.autoparallel.layouts.op_table import is_tensor, operation_of, tensor_inputs
from axonn.autoparallel.layouts.shardings import Form, Repeated, Shard, ShardingRule, State, Wanted
from axonn.autoparallel.sharded_layers import AXES, Key, LayerLayout, LayerOperation, WholeModule, module_operation
from axonn.autoparallel.tracing.op_names import op_name
from axonn.placement import Cut
from axonn.tensor.context import TensorAxis, TensorContext

_FORMS = 6
"""Most forms considered per value, first those of its own layer, then those its neighbours want."""
_SIZES = ("size", "dim", "ndimension", "is_floating_point", "get_device", "element_size")
_ATTRIBUTES = ("shape", "device", "dtype", "ndim", "requires_grad", "is_cuda", "layout")


class Option(NamedTuple):
    """One way to compute a node: the layouts it wants of its inputs, that of its output, and the elements it sends."""

    wanted: tuple[Wanted, ...]
    output: State
    cost: float = 0.0
    choice: LayerLayout | None = None
    """Layout of the layer, if the node is one."""
    rule: ShardingRule | None = None
    """Rule of an operation that carries a cut."""


def operations_of(root: fx.GraphModule) -> dict[fx.Node, Operation]:
    """Return the operation of each node that computes with tensors; nodes that read only metadata have none."""
    operations: dict[fx.Node, Operation] = {}
    for node in root.graph.nodes:
        if reads_metadata(node):
            continue
        inputs = tensor_inputs(node)
        if node.op == "call_module" and inputs and is_tensor(node):
            operations[node] = module_operation(node, inputs, root.get_submodule(str(node.target)))
        elif node.op in ("call_function", "call_method", "call_module") and (inputs or is_tensor(node)):
            operations[node] = operation_of(node, operations)
        elif node.op == "output":
            operations[node] = Operation(node, inputs, "outputs are whole")
    return operations


def reads_metadata(node: fx.Node) -> bool:
    """Return True if a node reads only the size, type, device or similar metadata of a tensor."""
    name = op_name(node)
    return name in _SIZES or (name == "getattr" and node.args[1] in _ATTRIBUTES)


def needing_gradients(root: fx.GraphModule, operations: Mapping[fx.Node, Operation]) -> set[fx.Node]:
    """Return the values that depend on trained parameters."""
    values: set[fx.Node] = set()
    for node in root.graph.nodes:
        if node.op == "get_attr" and is_tensor(node):
            trained = attribute(root, node).requires_grad
        elif node.op == "call_module":
            trained = any(p.requires_grad for p in root.get_submodule(str(node.target)).parameters())
        else:
            trained = False
        if trained or (node in operations and any(i in values for i in operations[node].inputs)):
            values.add(node)
    return values


def attribute(root: nn.Module, node: fx.Node) -> nn.Parameter:
    """Return the parameter or buffer that a node reads."""
    value = root
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value  # type: ignore[return-value]


class Candidates:
    """Forms that each value may have, and the rules of each operation that connect them."""

    def __init__(self, operations: Mapping[fx.Node, Operation], context: TensorContext) -> None:
        self.forms: dict[fx.Node, list[Form]] = {}
        self.rules: dict[fx.Node, list[ShardingRule]] = {}
        self._operations = operations
        self._extents = [context.extent(axis) for axis in AXES if context.extent(axis) > 1]
        self._users: dict[fx.Node, list[tuple[Operation, int]]] = {}
        self._waiting: deque[tuple[fx.Node, Form]] = deque()
        for operation in operations.values():
            for position, source in enumerate(operation.inputs):
                self._users.setdefault(source, []).append((operation, position))
        self._fill()

    def _fill(self) -> None:
        for operation in self._operations.values():
            if isinstance(operation, LayerOperation):
                input_form, output_form = operation.own_forms()
                self._add_form(operation.node, output_form)
                if operation.features.input is not None:
                    self._add_form(operation.inputs[0], input_form)
            self._add_rules(operation, operation.seeds())
        while self._waiting:
            node, form = self._waiting.popleft()
            if node in self._operations:
                self._add_rules(self._operations[node], self._operations[node].demand(form))
            for operation, position in self._users.get(node, ()):
                self._add_rules(operation, operation.carry(position, form))

    def _add_form(self, node: fx.Node, form: Form) -> None:
        forms = self.forms.setdefault(node, [])
        if form not in forms and len(forms) < _FORMS and any(form.divides(extent) for extent in self._extents):
            forms.append(form)
            self._waiting.append((node, form))

    def _add_rules(self, operation: Operation, rules: Iterable[ShardingRule]) -> None:
        known = self.rules.setdefault(operation.node, [])
        for rule in rules:
            if rule not in known and len(known) < 2 * _FORMS:
                known.append(rule)
                self._add_form(operation.node, rule.output)
                for source, form in zip(operation.inputs, rule.inputs, strict=True):
                    if form is not None:
                        self._add_form(source, form)


def options_of(
    root: fx.GraphModule,
    operations: Mapping[fx.Node, Operation],
    context: TensorContext,
    gradients: set[fx.Node],
    *,
    whole_outputs: bool,
) -> dict[fx.Node, list[Option]]:
    """Return the options of every node with a tensor or with tensor inputs. The first one is always whole."""
    candidates = Candidates(operations, context)
    options: dict[fx.Node, list[Option]] = {}
    for node in root.graph.nodes:
        if node.op == "placeholder" and is_tensor(node):
            options[node] = [Option((), None)]
        elif node.op == "get_attr" and is_tensor(node):
            shards = _shards(candidates.forms.get(node, ()), context)
            options[node] = [Option((), None), *(Option((), shard) for shard in shards)]
        elif node.op == "output" and not whole_outputs:
            continue
        elif node in operations:
            options[node] = _options(operations[node], candidates, context, gradients)
    _restrict(root, operations, options)
    return options


def keys(root: fx.GraphModule, operation: Operation | None, node: fx.Node, option: Option) -> dict[int, Key]:
    """Return how an option cuts the parameters that its node holds, by their identity."""
    if node.op == "get_attr":
        shard = option.output
        key = () if shard is None else (Cut(shard.form.dim, shard.axis, shard.form.segments),)
        return {id(attribute(root, node)): key}
    if isinstance(operation, LayerOperation) and option.choice is not None:
        choice = option.choice
        named = operation.module.named_parameters(recurse=False)
        return {id(parameter): operation.key(name, choice) for name, parameter in named}
    if isinstance(operation, WholeModule):
        return {id(parameter): () for parameter in root.get_submodule(str(node.target)).parameters()}
    return {}


def holders(root: fx.GraphModule, nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """Return, for each shared parameter, the nodes that hold it."""
    nodes_by_parameter: dict[int, list[fx.Node]] = {}
    for node in nodes:
        held: Iterable[object] = ()
        if node.op == "get_attr":
            held = (attribute(root, node),)
        elif node.op == "call_module":
            held = root.get_submodule(str(node.target)).parameters()
        for parameter in held:
            if isinstance(parameter, nn.Parameter):
                nodes_by_parameter.setdefault(id(parameter), []).append(node)
    return [group for group in nodes_by_parameter.values() if len(group) > 1]


def _options(
    operation: Operation, candidates: Candidates, context: TensorContext, gradients: set[fx.Node]
) -> list[Option]:
    uncut = Option((None,) * len(operation.inputs), None)
    if isinstance(operation, LayerOperation):
        source = operation.inputs[0]
        choices = operation.choices(
            context,
            candidates.forms.get(source, ()),
            candidates.forms.get(operation.node, ()),
            gradient=source in gradients,
        )
        return [Option((operation.wanted(c),), c.output, c.cost, c) for c in choices]
    carried = [
        Option(_wanted(rule, axis), Shard(axis, rule.output), rule=rule)
        for axis in AXES
        if context.extent(axis) > 1
        for rule in candidates.rules.get(operation.node, ())
        if all(form is None or form.divides(context.extent(axis)) for form in (*rule.inputs, rule.output))
    ]
    return [uncut, *carried]


def _wanted(rule: ShardingRule, axis: TensorAxis) -> tuple[Wanted, ...]:
    return tuple(Repeated(axis) if form is None else Shard(axis, form) for form in rule.inputs)


def _shards(forms: Sequence[Form], context: TensorContext) -> list[Shard]:
    return [
        Shard(axis, form)
        for axis in AXES
        if context.extent(axis) > 1
        for form in forms
        if form.divides(context.extent(axis))
    ]


def _restrict(
    root: fx.GraphModule, operations: Mapping[fx.Node, Operation], options: dict[fx.Node, list[Option]]
) -> None:
    """Keep only the options of layers that share their work among the most ranks.

    Where several nodes hold a parameter, only options that cut it alike are considered.
    """
    restricted = {node: _most_parallel(operations.get(node), node_options) for node, node_options in options.items()}
    for group in holders(root, options):
        if not _restrict_to_common(root, operations, group, restricted):
            for node in group:
                restricted[node] = list(options[node])
            _restrict_to_common(root, operations, group, restricted)
            for node in group:
                restricted[node] = _most_parallel(operations.get(node), restricted[node])
    options.update(restricted)


def _most_parallel(operation: Operation | None, options: Sequence[Option]) -> list[Option]:
    if not isinstance(operation, LayerOperation) or operation.norm:
        return list(options)
    most = max(o.choice.ranks for o in options if o.choice is not None)
    return [o for o in options if o.choice is not None and o.choice.ranks == most]


def _restrict_to_common(
    root: fx.GraphModule,
    operations: Mapping[fx.Node, Operation],
    group: Sequence[fx.Node],
    options: dict[fx.Node, list[Option]],
) -> bool:
    """Keep only the options of a group that cut its shared parameters in a way that all nodes can.

    Returns False, and changes nothing, if there are none.
    """
    keys_by_node = {
        node: [keys(root, operations.get(node), node, option) for option in options[node]] for node in group
    }
    common: dict[int, set[Key]] = {}
    for node_keys in keys_by_node.values():
        for parameter in node_keys[0]:
            possible = {key[parameter] for key in node_keys}
            common[parameter] = common[parameter] & possible if parameter in common else possible
    remaining = {
        node: [
            o
            for o, node_keys in zip(options[node], keys_by_node[node], strict=True)
            if all(k in common[p] for p, k in node_keys.items())
        ]
        for node in group
    }
    if not all(remaining.values()):
        return False
    options.update(remaining)
    return True
