"""The module of one rank: the traced graph with layers, parameters and re-layouts as the plan says."""

from __future__ import annotations

import copy
import operator
from typing import Any, cast

import torch
from torch import fx, nn

from axonn.autoparallel.layouts.layout_assignment import LayoutPlan
from axonn.autoparallel.layouts.layout_choices import asks_only
from axonn.autoparallel.layouts.op_rules import Operation
from axonn.autoparallel.layouts.op_table import is_tensor
from axonn.autoparallel.layouts.shardings import Repeated, Shard, Wanted, brief
from axonn.autoparallel.parallel_report import LayerLine, RedistributionLine, Report, WholeLine
from axonn.autoparallel.redistribute_modules import Change, received, sent
from axonn.autoparallel.sharded_layers import LayerOperation, WholeModule, build, build_dropout
from axonn.autoparallel.tracing.op_names import kind_of
from axonn.autoparallel.tracing.source_lines import at
from axonn.errors import ConfigError
from axonn.placement import Cut, Placement
from axonn.tensor.context import TensorContext
from axonn.tensor.layers.layer import TensorLayer


def part_of(whole: torch.Tensor, placement: Placement, context: TensorContext) -> torch.Tensor:
    """This rank's part of a parameter, as a tensor of its own."""
    part = whole.new_empty(placement.local_shape(context.grid))
    for local, of_whole in placement.pieces(context.grid, context.coordinates):
        part[local] = whole[of_whole]
    return part


class Rewriter:
    """Builds `module` from a plan. `placements`: of every parameter and buffer, under every name the original has."""

    def __init__(self, root: fx.GraphModule, original: nn.Module, plan: LayoutPlan, context: TensorContext) -> None:
        self._root = root
        self._original = original
        self._plan = plan
        self._context = context
        self._graph = fx.Graph()
        self._new: dict[fx.Node, fx.Node] = {}
        self._have: dict[fx.Node, dict[Wanted, fx.Node]] = {}
        self._attributes: dict[str, Any] = {}
        self._changes = next(
            n for n in ("redistributions", "redistributions_", "redistributions__") if not hasattr(original, n)
        )
        self._copies: dict[int, Any] = {}
        """Copies by the identity of what they are copies of, so that what is tied stays tied."""
        self._placed: dict[int, Placement] = {}
        """How what is cut lies, by the same identity: whatever its name, there is one tensor."""
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
        if asks_only(node):
            self._new[node] = self._asked(node)
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
        if operation is not None and option is not None and option.link is not None:
            assert option.output is not None
            operation.node = new
            operation.localise(option.link, self._context.extent(option.output.axis))
        self._new[node] = new
        self._have[node] = {option.output if option is not None else None: new}

    def _arguments(self, node: fx.Node, operation: Operation | None) -> tuple[Any, Any]:
        option = self._plan.options.get(node)
        wanted = iter(option.wanted if option is not None and operation is not None else ())
        position = -1

        def argument(source: fx.Node) -> fx.Node:
            nonlocal position
            if operation is None or option is None or not is_tensor(source):
                return self._new[source]
            position += 1
            return self._deliver(source, next(wanted), operation, position)

        found: tuple[Any, Any] = fx.node.map_arg((node.args, node.kwargs), argument)
        return found

    def _deliver(self, source: fx.Node, want: Wanted, user: Operation, position: int) -> fx.Node:
        """`source` as it is wanted, made from whatever layout of it is there with the least communication."""
        have = self._have[source]
        if want in have:
            return have[want]
        if isinstance(want, Repeated) and not source.meta["val"].is_floating_point():
            return self._deliver(source, None, user, position)
        value = source.meta["val"]
        trained = source in self._plan.gradients
        calls = {
            state: sent(value.numel(), value.is_floating_point(), state, want, self._context)
            for state in have
            if not isinstance(state, Repeated)
        }

        def cost(state: Any) -> float:
            forward, backward = calls[state]
            return sum(received(call, self._context) for call in [*forward, *(backward if trained else [])])

        best = min(calls, key=cost)
        target = f"{self._changes}.{len(self.report.redistributions)}"
        self._attributes[target] = Change(best, want, self._context)
        have[want] = self._graph.call_module(target, (have[best],))
        self.report.redistributions.append(
            RedistributionLine(
                value=source.name,
                user=user.node.name,
                source=best,
                target=want,
                reason=self._reason(user, position, best, want),
                forward=tuple(calls[best][0]),
                backward=tuple(calls[best][1]),
                trained=trained,
            )
        )
        return have[want]

    def _reason(self, user: Operation, position: int, have: Wanted, want: Wanted) -> str:
        name = user.node.name
        if isinstance(user, LayerOperation):
            return f"{user.node.target} takes its input so"
        if isinstance(want, Repeated):
            return f"{name} uses it for each part of something that is cut"
        if isinstance(want, Shard):
            return f"{name} goes on with what is cut so"
        if not isinstance(have, Shard):
            return ""
        links = user.carry(position, have.form)
        if not links:
            return user.why_not(position, have.form)
        extent = self._context.extent(have.axis)
        odd = next((form for link in links for form in link[0] if form and not form.divides(extent)), links[0].output)
        if not odd.divides(extent):
            return f"dim {odd.dim} of {name} ({brief(odd.segments)}) cannot be cut along {have.axis} = {extent}"
        return f"{name} works on what is whole, with which less is sent than with parts"

    def _asked(self, node: fx.Node) -> fx.Node:
        """What a node asks of a tensor: sizes are those of the whole."""
        new = self._graph.node_copy(node, lambda n: self._new[n])
        source = node.args[0]
        option = self._plan.options.get(source) if isinstance(source, fx.Node) else None
        kind = kind_of(node)
        if option is None or option.output is None or kind not in ("getattr", "size"):
            return new
        part = option.output
        extent = self._context.extent(part.axis)
        if kind == "getattr":
            return (
                self._graph.call_function(whole_shape, (new, part.form.dim, extent)) if node.args[1] == "shape" else new
            )
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if dim is None:
            return self._graph.call_function(whole_shape, (new, part.form.dim, extent))
        assert isinstance(source, fx.Node)
        if cast(int, dim) % source.meta["val"].dim() == part.form.dim:
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
        part = self._plan.options[node].output
        cuts = () if part is None else (Cut(part.form.dim, part.axis, part.form.segments),)
        placement = Placement(shape=tuple(value.shape), cuts=cuts)
        if id(value) not in self._copies:
            self._copies[id(value)] = _like(value, part_of(value.detach(), placement, self._context))
            self._placed[id(value)] = placement
        self._attributes[name] = self._copies[id(value)]
        if part is None and isinstance(value, nn.Parameter) and value.dim() > 1 and self._context.grid.tensor > 1:
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
        why = operation.why(choice, self._context)
        kind = type(module).__name__
        if choice.ranks == 1 and self._context.grid.tensor > 1:
            self.report.whole.append(WholeLine(name=name, kind=kind, reason=why))
        else:
            self.report.layers.append(
                LayerLine(name=name, kind=kind, input=choice.input, output=choice.output, note=why)
            )

    def _fill(self, layer: TensorLayer, module: nn.Module) -> None:
        """Give a layer its parts of the parameters of `module`; what others hold too is the same object."""
        for name, whole in module.named_parameters(recurse=False):
            if id(whole) in self._copies:
                setattr(layer, name, self._copies[id(whole)])
                continue
            parameter = getattr(layer, name)
            parameter.copy_(part_of(whole.detach(), layer.placements[name], self._context))
            parameter.requires_grad_(whole.requires_grad)
            self._copies[id(whole)] = parameter
            self._placed[id(whole)] = layer.placements[name]

    def _place_dropout(self, node: fx.Node) -> str:
        """Each call has a module, and so a stream of masks, of its own."""
        module = self._root.get_submodule(str(node.target))
        assert isinstance(module, nn.Dropout)
        rows = self._plan.rows.forms.get(node)
        if rows is not None and rows.dim:
            raise ConfigError(
                f"dropout {node.target} ({node.name}) has the rows of the batch in dim {rows.dim}{at(node)}; its "
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
        """The original's module, parameter or buffer of this name, or else what tracing has made."""
        try:
            return operator.attrgetter(name)(self._original)
        except AttributeError:
            return operator.attrgetter(name)(self._root)

    def _mode(self, name: str) -> bool:
        """Whether the original module is in training."""
        try:
            return self._original.get_submodule(name).training
        except AttributeError:
            return self._original.training

    def _add_unused(self) -> None:
        """Add the names that the graph does not read: what is tied is the part that others hold, the rest is whole.
        Buffers that the original does not save are not saved."""
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
    """The shape of the whole, of whose dim `dim` each of `extent` ranks has a part."""
    return torch.Size([size * extent if d == dim else size for d, size in enumerate(shape)])


def _like(value: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(part, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else part


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
