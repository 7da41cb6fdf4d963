"""Which modules of torch become tensor-parallel layers, in which layouts, and what they compute and send then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

from torch import fx, nn

from axonn import tensor
from axonn.autoparallel.layer_kinds import Place, Shapes, has_hooks, layer_kind
from axonn.autoparallel.layouts.op_rules import Labelled, Operation, shape_of
from axonn.autoparallel.layouts.shardings import Form, Shard, ShardingRule, State
from axonn.placement import Cut
from axonn.tensor.context import TensorAxis, TensorContext
from axonn.tensor.layers.layer import Layout

AXES: tuple[TensorAxis, ...] = ("row", "col")
Key = tuple[Cut, ...]
"""The cuts of a parameter. Whoever holds the same parameter must have it under the same key."""


_ATTENTIONS = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


class LayerLayout(NamedTuple):
    """One way to lay out a layer. `cost`: elements that the layer itself sends; `ranks`: how many share its work."""

    input: State
    """For an embedding, whose input has no features, how its vocabulary lies."""
    output: State
    cost: float
    ranks: int


class LayerOperation(Operation):
    """A layer that can be cut. It carries no cut by itself: it has `choices`."""

    def __init__(self, node: fx.Node, inputs: Sequence[fx.Node], module: nn.Module) -> None:
        super().__init__(node, inputs)
        self.module = module
        kind = layer_kind(module)
        assert kind is not None, f"{type(module).__name__} is no layer that is cut"
        self.kind = kind
        self.shapes = Shapes(shape_of(inputs[0]), shape_of(node))
        self.features = self.kind.features(module, self.shapes)
        self.norm = self.kind.normalises
        source, output = self.kind.alike(module, len(self.shapes.input))
        self.alike = Labelled(node, inputs, [source], output)

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        f = self.features
        segments = self.kind.segmented or len(form.segments) == 1
        return [ShardingRule((form,), form)] if self.norm and form.dim == f.output and segments else []

    def demand(self, form: Form) -> list[ShardingRule]:
        return self.carry(0, form)

    def why_not(self, position: int, form: Form) -> str:
        return "its layout is another one"

    def own_forms(self) -> tuple[Form, Form]:
        """Those of its input and its output features in one segment. (The first dim for what has no features.)"""
        f = self.features
        return Form(f.input or 0, (f.input_size,)), Form(f.output, (f.output_size,))

    def wanted(self, choice: LayerLayout) -> State:
        """How it wants its input."""
        return None if self.features.input is None else choice.input

    def choices(
        self, context: TensorContext, inputs: Sequence[Form], outputs: Sequence[Form], *, gradient: bool
    ) -> list[LayerLayout]:
        """All layouts, whole first. `inputs`, `outputs`: forms that its neighbours have or want; `gradient`: whether
        its input needs one."""
        one, two = self.own_forms()
        cutting = _cutting(context)
        if self.norm:
            forms = _unique(one, inputs) if self.kind.segmented else [one]
            parts = [Shard(axis, form) for axis, form in product(cutting, forms) if form.divides(context.extent(axis))]
            return [LayerLayout(None, None, 0.0, 1), *(LayerLayout(p, p, 0.0, context.extent(p.axis)) for p in parts)]
        ins = [one] if self.features.input is None else _unique(one, inputs)
        return [
            self._choice(context, source, target, gradient)
            for source, target in product(
                _parts(cutting, ins, context), _parts(cutting, _unique(two, outputs), context)
            )
            if source is None or target is None or source.axis != target.axis
        ]

    def key(self, name: str, choice: LayerLayout) -> Key:
        """Of the parameter `name` of the module."""
        parameter: nn.Parameter = getattr(self.module, name)
        of_output, of_input = self.kind.weight_dims
        cuts = {}
        if choice.output is not None:
            cuts[parameter.dim() - 1 if self.norm else of_output] = choice.output
        if name == "weight" and not self.norm and choice.input is not None:
            cuts[of_input] = choice.input
        return tuple(Cut(dim, cuts[dim].axis, cuts[dim].form.segments) for dim in sorted(cuts))

    def why(self, choice: LayerLayout, context: TensorContext) -> str:
        """Why it is not cut along more axes; empty when it is cut along all there are."""
        if choice.ranks == context.grid.tensor or (self.norm and choice.output is not None):
            return ""
        if self.norm:
            return "its input is whole"
        found = []
        for size, name in zip((self.features.input_size, self.features.output_size), self.features.names, strict=True):
            undivided = [
                f"{axis} = {context.extent(axis)}" for axis in _cutting(context) if size % context.extent(axis)
            ]
            if undivided:
                found.append(f"{name} ({size}) is no multiple of {' or '.join(undivided)}")
        return "; ".join(found) or "its neighbours lie so"

    def _choice(self, context: TensorContext, source: State, target: State, gradient: bool) -> LayerLayout:
        e_in, e_out = (context.extent(_axis(state)) for state in (source, target))
        cost = 2 * (e_in - 1) / e_in * prod(shape_of(self.node)) / e_out
        if self.features.input is not None and gradient:
            cost += 2 * (e_out - 1) / e_out * prod(shape_of(self.inputs[0])) / e_in
        return LayerLayout(source, target, cost, e_in * e_out)


class WholeModule(Operation):
    """A module that stays as it is."""

    def __init__(self, node: fx.Node, inputs: Sequence[fx.Node], module: nn.Module, reason: str) -> None:
        super().__init__(node, inputs, reason)
        batched = -1
        if isinstance(module, nn.modules.conv._ConvNd):
            batched = len(module.kernel_size) + 2
        known = len(shape_of(inputs[0])) == batched or type(module) in (nn.Embedding, nn.Linear, nn.PReLU)
        if known and not has_hooks(module):
            source, output = (range(len(shape_of(n))) for n in (inputs[0], node))
            labels = [["rows", *[None] * (len(dims) - 1)] for dims in (source, output)]
            self.alike: Operation = Labelled(node, inputs, [labels[0]], labels[1])


class Dropped(Operation):
    """`nn.Dropout`, whose layer knows cuts in one segment and rows in dim 0."""

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        return [ShardingRule((form,), form)] if form.dim > 0 and len(form.segments) == 1 else []

    def demand(self, form: Form) -> list[ShardingRule]:
        return self.carry(0, form)


def module_operation(node: fx.Node, inputs: Sequence[fx.Node], module: nn.Module) -> Operation:
    """What a module that the graph calls does with cuts."""
    if type(module) is nn.Dropout:
        found: Operation = Dropped(node, inputs)
        labels = range(len(shape_of(node)))
        found.alike = Labelled(node, inputs, [labels], labels)
        return found
    reason = refusal(module)
    return WholeModule(node, inputs, module, reason) if reason else LayerOperation(node, inputs, module)


def refusal(module: nn.Module) -> str:
    """Why a module stays whole; empty when it is one that can be cut."""
    kind = layer_kind(module)
    if kind is not None:
        return kind.refusal(module)
    if type(module) is nn.Dropout:
        return ""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batch norm mixes rows, and its statistics are those of whole channels"
    if has_hooks(module):
        return "its hooks expect whole tensors"
    why = f"parallelize does not cut {type(module).__name__}"
    if isinstance(module, _ATTENTIONS):
        why += ", but nn.Linear and F.scaled_dot_product_attention, of which it can be written"
    return why


def build(module: nn.Module, choice: LayerLayout, context: TensorContext) -> nn.Module:
    """The layer of `choice` on this rank, its parameters still empty."""
    parameter = next(module.parameters(), None)
    like: dict[str, Any] = {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}
    place = Place(
        context, Layout(_axis(choice.input), _axis(choice.output)), (_segments(choice.input), _segments(choice.output))
    )
    kind = layer_kind(module)
    assert kind is not None, f"{type(module).__name__} is no layer that is cut"
    return kind.build(module, place, like).train(module.training)


def build_dropout(module: nn.Dropout, state: State, context: TensorContext, *, name: str) -> nn.Module:
    """That of an activation that lies so."""
    cuts = () if state is None else ((state.form.dim, state.axis),)
    return tensor.Dropout(module.p, name=name, context=context, cuts=cuts).train(module.training)


def _unique(whole: Form, forms: Iterable[Form]) -> list[Form]:
    return list(dict.fromkeys([whole, *(f for f in forms if f.dim == whole.dim)]))


def _parts(axes: Sequence[TensorAxis], forms: Sequence[Form], context: TensorContext) -> list[State]:
    cut = [Shard(axis, form) for axis, form in product(axes, forms) if form.divides(context.extent(axis))]
    return [None, *cut]


def _cutting(context: TensorContext) -> list[TensorAxis]:
    return [axis for axis in AXES if context.extent(axis) > 1]


def _segments(state: State) -> tuple[int, ...] | None:
    return None if state is None else state.form.segments


def _axis(state: State) -> TensorAxis | None:
    return None if state is None else state.axis
