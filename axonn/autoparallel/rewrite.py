"""Rewriting of a traced graph into the module of one rank, with the plan's layers, shards and redistributions."""

from __future__ import annotations

import copy
import operator
from typing import Any, cast

import torch
from torch import fx, nn

from axonn.autoparallel.layouts.layout_assignment import LayoutPlan
from axonn.autoparallel.layouts.layout_choices import reads_metadata
from axonn.autoparallel.layouts.op_rules import Operation
from axonn.autoparallel.layouts.op_table import is_tensor
from axonn.autoparallel.layouts.shardings import Repeated, Shard, Wanted, brief
from axonn.autoparallel.parallel_report import LayerLine, RedistributionLine, Report, WholeLine
from axonn.autoparallel.redistribute_modules import Redistribute, elements_received, redistribution_collectives
from axonn.autoparallel.sharded_layers import LayerOperation, WholeModule, build, build_dropout
from axonn.autoparallel.tracing.op_names import op_name
from axonn.autoparallel.tracing.source_lines import location
from axonn.errors import ConfigError
from axonn.placement import Cut, Placement
from axonn.tensor.context import TensorContext
from axonn.tensor.layers.layer import TensorLayer


def part_of(whole: torch.Tensor, placement: Placement, context: TensorContext) -> torch.Tensor:
    """Return a copy of this rank's shard of a parameter."""
    shard = whole.new_empty(placement.local_shape(context.grid))
    for local, box in placement.pieces(context.grid, context.coordinates):
        shard[local] = whole[box]
    return shard


class Rewriter:
    """Builder of `module` from a plan. `placements`: those of all parameters and buffers, under every original name."""

    def __init__(self, root: fx.GraphModule, original: nn.Module, plan: LayoutPlan, context: TensorContext) -> None:
        self._root = root
        self._original = original
        self._plan = plan
        self._context = context
        self._graph = fx.Graph()
        self._new: dict[fx.Node, fx.Node] = {}
        self._available: dict[fx.Node, dict[Wanted, fx.Node]] = {}
        self._attributes: dict[str, Any] = {}
        self._redistributions = next(
            n for n in ("redistributions", "redistributions_", "redistributions__") if not hasattr(original, n)
        )
        self._copies: dict[int, Any] = {}
        """Copies by the identity of their originals, so that tied parameters stay tied."""
        self._placed: dict[int, Placement] = {}
        """Placements of cut tensors by the identity of their originals: a tensor may have several names."""
        self.report = Report(grid=str(context.grid), exact=plan.exact)
        with torch.no_grad():
            for node in root.graph.nodes:
                self._rewrite(node)
        self.module = fx.GraphModule(self._attributes, self._graph, type(original).__name__)
        self._add_unused()
        self.placements = {
            name: self._placed.get(id(value), Placement(shape=tuple(value.shape)))
            for name, value in _named_tensors(original)
        }

    def _rewrite(self, node: fx.Node) -> None:
        operation = self._plan.operations.get(node)
        if node.op == "get_attr" and is_tensor(node):
            self._place_attribute(node)
        elif node.op == "call_module":
            self._place_module(node, operation)
        if reads_metadata(node):
            self._new[node] = self._metadata(node)
            return
        arguments = self._arguments(node, operation)
        if node.op == "output":
            self._output(node, arguments)
            return
        new = self._graph.node_copy(node)
        new.args, new.kwargs = arguments
        # Annotations may be strings, which the module's code cannot be saved with.
        new.type = None
        if node.op == "call_module" and isinstance(operation, Operation) and self._is_dropout(node):
            new.target = self._place_dropout(node)
        option = self._plan.options.get(node)
        if operation is not None and option is not None and option.rule is not None:
            assert option.output is not None
            operation.node = new
            operation.localise(option.rule, self._context.extent(option.output.axis))
        self._new[node] = new
        self._available[node] = {option.output if option is not None else None: new}

    def _arguments(self, node: fx.Node, operation: Operation | None) -> tuple[Any, Any]:
        option = self._plan.options.get(node)
        layouts = iter(option.wanted if option is not None and operation is not None else ())
        position = -1

        def argument(source: fx.Node) -> fx.Node:
            nonlocal position
            if operation is None or option is None or not is_tensor(source):
                return self._new[source]
            position += 1
            return self._deliver(source, next(layouts), operation, position)

        arguments: tuple[Any, Any] = fx.node.map_arg((node.args, node.kwargs), argument)
        return arguments

    def _deliver(self, source: fx.Node, wanted: Wanted, user: Operation, position: int) -> fx.Node:
        """Return `source` in layout `wanted`, made from the available layout that needs the least communication."""
        available = self._available[source]
        if wanted in available:
            return available[wanted]
        if isinstance(wanted, Repeated) and not source.meta["val"].is_floating_point():
            return self._deliver(source, None, user, position)
        value = source.meta["val"]
        trained = source in self._plan.gradients
        calls = {
            state: redistribution_collectives(value.numel(), value.is_floating_point(), state, wanted, self._context)
            for state in available
            if not isinstance(state, Repeated)
        }

        def cost(state: Any) -> float:
            forward, backward = calls[state]
            return sum(elements_received(call, self._context) for call in [*forward, *(backward if trained else [])])

        best = min(calls, key=cost)
        target = f"{self._redistributions}.{len(self.report.redistributions)}"
        self._attributes[target] = Redistribute(best, wanted, self._context)
        available[wanted] = self._graph.call_module(target, (available[best],))
        self.report.redistributions.append(
            RedistributionLine(
                value=source.name,
                user=user.node.name,
                source=best,
                target=wanted,
                reason=self._reason(user, position, best, wanted),
                forward=tuple(calls[best][0]),
                backward=tuple(calls[best][1]),
                trained=trained,
            )
        )
        return available[wanted]

    def _reason(self, user: Operation, position: int, source: Wanted, wanted: Wanted) -> str:
        name = user.node.name
        if isinstance(user, LayerOperation):
            return f"{user.node.target} takes its input so"
        if isinstance(wanted, Repeated):
            return f"{name} uses it for each part of something that is cut"
        if isinstance(wanted, Shard):
            return f"{name} goes on with what is cut so"
        if not isinstance(source, Shard):
            return ""
        rules = user.carry(position, source.form)
        if not rules:
            return user.why_not(position, source.form)
        extent = self._context.extent(source.axis)
        undivided = next(
            (form for rule in rules for form in rule[0] if form and not form.divides(extent)), rules[0].output
        )
        if not undivided.divides(extent):
            lengths = brief(undivided.segments)
            return f"dim {undivided.dim} of {name} ({lengths}) cannot be cut along {source.axis} = {extent}"
        return f"{name} works on what is whole, with which less is sent than with parts"

    def _metadata(self, node: fx.Node) -> fx.Node:
        """Copy a node that reads metadata of a tensor, such that sizes are those of the whole tensor."""
        new = self._graph.node_copy(node, lambda n: self._new[n])
        source = node.args[0]
        option = self._plan.options.get(source) if isinstance(source, fx.Node) else None
        kind = op_name(node)
        if option is None or option.output is None or kind not in ("getattr", "size"):
            return new
        shard = option.output
        extent = self._context.extent(shard.axis)
        if kind == "getattr":
            return (
                self._graph.call_function(whole_shape, (new, shard.form.dim, extent))
                if node.args[1] == "shape"
                else new
            )
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if dim is None:
            return self._graph.call_function(whole_shape, (new, shard.form.dim, extent))
        assert isinstance(source, fx.Node)
        if cast(int, dim) % source.meta["val"].dim() == shard.form.dim:
            return self._graph.call_function(operator.mul, (new, extent))
        return new

    def _output(self, node: fx.Node, arguments: tuple[Any, Any]) -> None:
        option = self._plan.options.get(node)
        for value in node.all_input_nodes:
            source = self._plan.options.get(value)
            self.report.outputs.append(None if option is not None or source is None else source.output)
        self._graph.output(arguments[0][0])

    def _place_attribute(self, node: fx.Node) -> None:
        name = str(node.target)
        if name in self._attributes:
            return
        value = self._source(name)
        shard = self._plan.options[node].output
        cuts = () if shard is None else (Cut(shard.form.dim, shard.axis, shard.form.segments),)
        placement = Placement(shape=tuple(value.shape), cuts=cuts)
        if id(value) not in self._copies:
            self._copies[id(value)] = _like(value, part_of(value.detach(), placement, self._context))
            self._placed[id(value)] = placement
        self._attributes[name] = self._copies[id(value)]
        if shard is None and isinstance(value, nn.Parameter) and value.dim() > 1 and self._context.grid.tensor > 1:
            user = next(iter(node.users))
            operation = self._plan.operations.get(user)
            reason = (operation.reason if operation is not None else "") or f"{user.name} uses it whole"
            self.report.whole.append(WholeLine(name=name, kind="parameter", reason=reason))

    def _place_module(self, node: fx.Node, operation: Operation | None) -> None:
        name = str(node.target)
        if name in self._attributes or self._is_dropout(node):
            return
        module = self._root.get_submodule(name)
        if not isinstance(operation, LayerOperation):
            self._attributes[name] = copy.deepcopy(self._source(name), self._copies)
            reason = operation.reason if isinstance(operation, WholeModule) else "its result is no tensor"
            self.report.whole.append(WholeLine(name=name, kind=type(module).__name__, reason=reason))
            return
        choice = self._plan.options[node].choice
        assert choice is not None
        layer = build(module, choice, self._context).train(self._mode(name))
        assert isinstance(layer, TensorLayer)
        self._fill(layer, module)
        self._attributes[name] = layer
        note = operation.why(choice, self._context)
        kind = type(module).__name__
        if choice.ranks == 1 and self._context.grid.tensor > 1:
            self.report.whole.append(WholeLine(name=name, kind=kind, reason=note))
        else:
            self.report.layers.append(
                LayerLine(name=name, kind=kind, input=choice.input, output=choice.output, note=note)
            )

    def _fill(self, layer: TensorLayer, module: nn.Module) -> None:
        """Fill a layer with its shards of the parameters of `module`; shared parameters become the same object."""
        for name, original in module.named_parameters(recurse=False):
            if id(original) in self._copies:
                setattr(layer, name, self._copies[id(original)])
                continue
            parameter = getattr(layer, name)
            parameter.copy_(part_of(original.detach(), layer.placements[name], self._context))
            parameter.requires_grad_(original.requires_grad)
            self._copies[id(original)] = parameter
            self._placed[id(original)] = layer.placements[name]

    def _place_dropout(self, node: fx.Node) -> str:
        """Add a module for one call of dropout, so that each call has a stream of masks of its own; return its name."""
        module = self._root.get_submodule(str(node.target))
        assert isinstance(module, nn.Dropout)
        rows = self._plan.rows.forms.get(node)
        if rows is not None and rows.dim:
            raise ConfigError(
                f"dropout {node.target} ({node.name}) has the rows of the batch in dim {rows.dim}{location(node)}; its "
                "masks are drawn by sample, so let it work where they are dim 0"
            )
        name, calls = str(node.target), 0
        while name in self._attributes:
            calls += 1
            name = f"{node.target}_{calls}"
        state = self._plan.options[node].output
        self._attributes[name] = build_dropout(module, state, self._context, name=name).train(
            self._mode(str(node.target))
        )
        return name

    def _is_dropout(self, node: fx.Node) -> bool:
        return type(self._root.get_submodule(str(node.target))) is nn.Dropout

    def _source(self, name: str) -> Any:
        """Return the original's module, parameter or buffer of this name, or else the one made by tracing."""
        try:
            return operator.attrgetter(name)(self._original)
        except AttributeError:
            return operator.attrgetter(name)(self._root)

    def _mode(self, name: str) -> bool:
        """Return True if the original module is in training mode."""
        try:
            return self._original.get_submodule(name).training
        except AttributeError:
            return self._original.training

    def _add_unused(self) -> None:
        """Add parameters and buffers that the graph does not read: tied ones as the shard, the others whole.

        Buffers that the original does not save are not saved.
        """
        held = {name for name, _ in _named_tensors(self.module)}
        saved = self._original.state_dict()
        for name, value in _named_tensors(self._original):
            if name not in held:
                if id(value) not in self._copies:
                    self._copies[id(value)] = _like(value, value.detach().clone())
                _put(self.module, name, self._copies[id(value)])
            if name not in saved:
                holder, _, last = name.rpartition(".")
                self.module.get_submodule(holder)._non_persistent_buffers_set.add(last)


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return all parameters and buffers, each under each of its names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return [*parameters, *module.named_buffers(remove_duplicate=False)]


def whole_shape(shape: torch.Size, dim: int, extent: int) -> torch.Size:
    """Return the shape of the whole tensor, whose dim `dim` is cut over `extent` ranks."""
    return torch.Size([size * extent if d == dim else size for d, size in enumerate(shape)])


def _like(value: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(shard, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else shard


def _put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    *path, last = name.split(".")
    for step in path:
        if not hasattr(module, step):
            module.add_module(step, nn.Module())
        module = getattr(module, step)
    if isinstance(value, nn.Parameter):
        module.register_parameter(last, value)
    else:
        module.register_buffer(last, value)
