"""The layouts that each node of a graph can have, found by carrying cuts through it in both directions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import fx, nn

from axonn.autoparallel.layouts.op_rules import Operation
from axonn.autoparallel.layouts.op_table import is_tensor, operation_of, tensor_inputs
from axonn.autoparallel.layouts.shardings import Form, Repeated, Shard, ShardingRule, State, Wanted
from axonn.autoparallel.sharded_layers import AXES, Key, LayerLayout, LayerOperation, WholeModule, module_operation
from axonn.autoparallel.tracing.op_names import kind_of
from axonn.placement import Cut
from axonn.tensor.context import TensorAxis, TensorContext

_FORMS = 6
"""Of one value that are considered, the first that are found: its own, then those its neighbours want."""
_SIZES = ("size", "dim", "ndimension", "is_floating_point", "get_device", "element_size")
_ATTRIBUTES = ("shape", "device", "dtype", "ndim", "requires_grad", "is_cuda", "layout")


class Option(NamedTuple):
    """One way to compute a node: how it wants its inputs, how its output lies, and what it sends itself."""

    wanted: tuple[Wanted, ...]
    output: State
    cost: float = 0.0
    choice: LayerLayout | None = None
    """Of a layer."""
    link: ShardingRule | None = None
    """Of an operation that carries a cut."""


def operations_of(root: fx.GraphModule) -> dict[fx.Node, Operation]:
    """What each node that computes with tensors does with cuts. Sizes, types and devices are no business of theirs."""
    found: dict[fx.Node, Operation] = {}
    for node in root.graph.nodes:
        if asks_only(node):
            continue
        inputs = tensor_inputs(node)
        if node.op == "call_module" and inputs and is_tensor(node):
            found[node] = module_operation(node, inputs, root.get_submodule(str(node.target)))
        elif node.op in ("call_function", "call_method", "call_module") and (inputs or is_tensor(node)):
            found[node] = operation_of(node, found)
        elif node.op == "output":
            found[node] = Operation(node, inputs, "outputs are whole")
    return found


def asks_only(node: fx.Node) -> bool:
    """Whether a node asks for the size, the type or the device of a tensor."""
    kind = kind_of(node)
    return kind in _SIZES or (kind == "getattr" and node.args[1] in _ATTRIBUTES)


def needing_gradients(root: fx.GraphModule, operations: Mapping[fx.Node, Operation]) -> set[fx.Node]:
    """The values that depend on parameters which are trained."""
    found: set[fx.Node] = set()
    for node in root.graph.nodes:
        if node.op == "get_attr" and is_tensor(node):
            trained = attribute(root, node).requires_grad
        elif node.op == "call_module":
            trained = any(p.requires_grad for p in root.get_submodule(str(node.target)).parameters())
        else:
            trained = False
        if trained or (node in operations and any(i in found for i in operations[node].inputs)):
            found.add(node)
    return found


def attribute(root: nn.Module, node: fx.Node) -> nn.Parameter:
    """The parameter or buffer that a node reads."""
    value = root
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value  # type: ignore[return-value]


class Candidates:
    """The forms that each value may have, and the links through each operation."""

    def __init__(self, operations: Mapping[fx.Node, Operation], context: TensorContext) -> None:
        self.forms: dict[fx.Node, list[Form]] = {}
        self.links: dict[fx.Node, list[ShardingRule]] = {}
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
                one, two = operation.own_forms()
                self._add_form(operation.node, two)
                if operation.features.input is not None:
                    self._add_form(operation.inputs[0], one)
            self._add_links(operation, operation.seeds())
        while self._waiting:
            node, form = self._waiting.popleft()
            if node in self._operations:
                self._add_links(self._operations[node], self._operations[node].demand(form))
            for operation, position in self._users.get(node, ()):
                self._add_links(operation, operation.carry(position, form))

    def _add_form(self, node: fx.Node, form: Form) -> None:
        found = self.forms.setdefault(node, [])
        if form not in found and len(found) < _FORMS and any(form.divides(extent) for extent in self._extents):
            found.append(form)
            self._waiting.append((node, form))

    def _add_links(self, operation: Operation, links: Iterable[ShardingRule]) -> None:
        found = self.links.setdefault(operation.node, [])
        for link in links:
            if link not in found and len(found) < 2 * _FORMS:
                found.append(link)
                self._add_form(operation.node, link.output)
                for source, form in zip(operation.inputs, link.inputs, strict=True):
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
    """The options of every node with a tensor or with tensors for inputs. The first one is always whole."""
    candidates = Candidates(operations, context)
    found: dict[fx.Node, list[Option]] = {}
    for node in root.graph.nodes:
        if node.op == "placeholder" and is_tensor(node):
            found[node] = [Option((), None)]
        elif node.op == "get_attr" and is_tensor(node):
            parts = _parts(candidates.forms.get(node, ()), context)
            found[node] = [Option((), None), *(Option((), part) for part in parts)]
        elif node.op == "output" and not whole_outputs:
            continue
        elif node in operations:
            found[node] = _options(operations[node], candidates, context, gradients)
    _agree(root, operations, found)
    return found


def keys(root: fx.GraphModule, operation: Operation | None, node: fx.Node, option: Option) -> dict[int, Key]:
    """How the option lays out the parameters that its node holds, by their identity."""
    if node.op == "get_attr":
        part = option.output
        key = () if part is None else (Cut(part.form.dim, part.axis, part.form.segments),)
        return {id(attribute(root, node)): key}
    if isinstance(operation, LayerOperation) and option.choice is not None:
        choice = option.choice
        named = operation.module.named_parameters(recurse=False)
        return {id(parameter): operation.key(name, choice) for name, parameter in named}
    if isinstance(operation, WholeModule):
        return {id(parameter): () for parameter in root.get_submodule(str(node.target)).parameters()}
    return {}


def holders(root: fx.GraphModule, nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """The nodes that hold a parameter in common, for each parameter that several hold."""
    found: dict[int, list[fx.Node]] = {}
    for node in nodes:
        held: Iterable[object] = ()
        if node.op == "get_attr":
            held = (attribute(root, node),)
        elif node.op == "call_module":
            held = root.get_submodule(str(node.target)).parameters()
        for parameter in held:
            if isinstance(parameter, nn.Parameter):
                found.setdefault(id(parameter), []).append(node)
    return [group for group in found.values() if len(group) > 1]


def _options(
    operation: Operation, candidates: Candidates, context: TensorContext, gradients: set[fx.Node]
) -> list[Option]:
    whole = Option((None,) * len(operation.inputs), None)
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
        Option(_wanted(link, axis), Shard(axis, link.output), link=link)
        for axis in AXES
        if context.extent(axis) > 1
        for link in candidates.links.get(operation.node, ())
        if all(form is None or form.divides(context.extent(axis)) for form in (*link.inputs, link.output))
    ]
    return [whole, *carried]


def _wanted(link: ShardingRule, axis: TensorAxis) -> tuple[Wanted, ...]:
    return tuple(Repeated(axis) if form is None else Shard(axis, form) for form in link.inputs)


def _parts(forms: Sequence[Form], context: TensorContext) -> list[Shard]:
    return [
        Shard(axis, form)
        for axis in AXES
        if context.extent(axis) > 1
        for form in forms
        if form.divides(context.extent(axis))
    ]


def _agree(root: fx.GraphModule, operations: Mapping[fx.Node, Operation], options: dict[fx.Node, list[Option]]) -> None:
    """Leave those options of layers that share their work among the most ranks; where several nodes hold a parameter,
    among those in which it lies alike."""
    busiest = {node: _busiest(operations.get(node), found) for node, found in options.items()}
    for group in holders(root, options):
        if not _alike(root, operations, group, busiest):
            for node in group:
                busiest[node] = list(options[node])
            _alike(root, operations, group, busiest)
            for node in group:
                busiest[node] = _busiest(operations.get(node), busiest[node])
    options.update(busiest)


def _busiest(operation: Operation | None, options: Sequence[Option]) -> list[Option]:
    if not isinstance(operation, LayerOperation) or operation.norm:
        return list(options)
    most = max(o.choice.ranks for o in options if o.choice is not None)
    return [o for o in options if o.choice is not None and o.choice.ranks == most]


def _alike(
    root: fx.GraphModule,
    operations: Mapping[fx.Node, Operation],
    group: Sequence[fx.Node],
    options: dict[fx.Node, list[Option]],
) -> bool:
    """Leave the options of a group in which each parameter they have in common lies as it can in all; False, and
    nothing is changed, where there is none."""
    held = {node: [keys(root, operations.get(node), node, option) for option in options[node]] for node in group}
    common: dict[int, set[Key]] = {}
    for found in held.values():
        for parameter in found[0]:
            keys_here = {key[parameter] for key in found}
            common[parameter] = common[parameter] & keys_here if parameter in common else keys_here
    left = {
        node: [
            o
            for o, found in zip(options[node], held[node], strict=True)
            if all(k in common[p] for p, k in found.items())
        ]
        for node in group
    }
    if not all(left.values()):
        return False
    options.update(left)
    return True
