"""Modules of torch that become tensor-parallel layers: their possible layouts, and what each layout sends."""

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
"""Cuts of a parameter. All nodes that hold the same parameter must cut it alike."""


_ATTENTIONS = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


class LayerLayout(NamedTuple):
    """One layout of a layer. `cost`: elements that the layer itself sends; `ranks`: how many ranks share its work."""

    input: State
    """Layout of the input features; for an embedding, whose input has none, of its vocabulary."""
    output: State
    cost: float
    ranks: int


class LayerOperation(Operation):
    """A layer that can be cut. Except for norms it carries no cut from input to output; it has `choices`."""

    def __init__(self, node: fx.Node, inputs: Sequence[fx.Node], module: nn.Module) -> None:
        super().__init__(node, inputs)
        self.module = module
        kind = layer_kind(module)
        assert kind is not None, f"{type(module).__name__} is no layer that is cut"
        self.kind = kind
        self.shapes = Shapes(shape_of(inputs[0]), shape_of(node))
        self.features = self.kind.features(module, self.shapes)
        self.norm = self.kind.normalises
        source, output = self.kind.labels(module, len(self.shapes.input))
        self.for_rows = Labelled(node, inputs, [source], output)

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        f = self.features
        segments = self.kind.segmented or len(form.segments) == 1
        return [ShardingRule((form,), form)] if self.norm and form.dim == f.output and segments else []

    def demand(self, form: Form) -> list[ShardingRule]:
        return self.carry(0, form)

    def why_not(self, position: int, form: Form) -> str:
        return "its layout is another one"

    def own_forms(self) -> tuple[Form, Form]:
        """Return the forms of its input and output features in one segment (dim 0 for an input without features)."""
        f = self.features
        return Form(f.input or 0, (f.input_size,)), Form(f.output, (f.output_size,))

    def wanted(self, choice: LayerLayout) -> State:
        """Return the layout in which it wants its input."""
        return None if self.features.input is None else choice.input

    def choices(
        self, context: TensorContext, inputs: Sequence[Form], outputs: Sequence[Form], *, gradient: bool
    ) -> list[LayerLayout]:
        """Return all layouts, whole first.

        `inputs`, `outputs`: forms that its neighbours have or want; `gradient`: True if its input needs a gradient.
        """
        input_form, output_form = self.own_forms()
        cutting = _cutting(context)
        if self.norm:
            forms = _unique(input_form, inputs) if self.kind.segmented else [input_form]
            shards = [Shard(axis, form) for axis, form in product(cutting, forms) if form.divides(context.extent(axis))]
            return [
                LayerLayout(None, None, 0.0, 1),
                *(LayerLayout(shard, shard, 0.0, context.extent(shard.axis)) for shard in shards),
            ]
        ins = [input_form] if self.features.input is None else _unique(input_form, inputs)
        return [
            self._choice(context, source, target, gradient)
            for source, target in product(
                _shards(cutting, ins, context), _shards(cutting, _unique(output_form, outputs), context)
            )
            if source is None or target is None or source.axis != target.axis
        ]

    def key(self, name: str, choice: LayerLayout) -> Key:
        """Return the cuts of the parameter `name` of the module."""
        parameter: nn.Parameter = getattr(self.module, name)
        output_dim, input_dim = self.kind.weight_dims
        cuts = {}
        if choice.output is not None:
            cuts[parameter.dim() - 1 if self.norm else output_dim] = choice.output
        if name == "weight" and not self.norm and choice.input is not None:
            cuts[input_dim] = choice.input
        return tuple(Cut(dim, cuts[dim].axis, cuts[dim].form.segments) for dim in sorted(cuts))

    def why(self, choice: LayerLayout, context: TensorContext) -> str:
        """Return why it is not cut along more axes; empty if it is cut along all there are."""
        if choice.ranks == context.grid.tensor or (self.norm and choice.output is not None):
            return ""
        if self.norm:
            return "its input is whole"
        reasons = []
        for size, name in zip((self.features.input_size, self.features.output_size), self.features.names, strict=True):
            undivided = [
                f"{axis} = {context.extent(axis)}" for axis in _cutting(context) if size % context.extent(axis)
            ]
            if undivided:
                reasons.append(f"{name} ({size}) is no multiple of {' or '.join(undivided)}")
        return "; ".join(reasons) or "its neighbours lie so"

    def _choice(self, context: TensorContext, source: State, target: State, gradient: bool) -> LayerLayout:
        input_extent, output_extent = (context.extent(_axis(state)) for state in (source, target))
        cost = 2 * (input_extent - 1) / input_extent * prod(shape_of(self.node)) / output_extent
        if self.features.input is not None and gradient:
            cost += 2 * (output_extent - 1) / output_extent * prod(shape_of(self.inputs[0])) / input_extent
        return LayerLayout(source, target, cost, input_extent * output_extent)


class WholeModule(Operation):
    """A module that stays whole."""

    def __init__(self, node: fx.Node, inputs: Sequence[fx.Node], module: nn.Module, reason: str) -> None:
        super().__init__(node, inputs, reason)
        batched = -1
        if isinstance(module, nn.modules.conv._ConvNd):
            batched = len(module.kernel_size) + 2
        known = len(shape_of(inputs[0])) == batched or type(module) in (nn.Embedding, nn.Linear, nn.PReLU)
        if known and not has_hooks(module):
            source, output = (range(len(shape_of(n))) for n in (inputs[0], node))
            labels = [["rows", *[None] * (len(dims) - 1)] for dims in (source, output)]
            self.for_rows: Operation = Labelled(node, inputs, [labels[0]], labels[1])


class DropoutOperation(Operation):
    """`nn.Dropout`, whose layer supports cuts in one segment and rows in dim 0."""

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        return [ShardingRule((form,), form)] if form.dim > 0 and len(form.segments) == 1 else []

    def demand(self, form: Form) -> list[ShardingRule]:
        return self.carry(0, form)


def module_operation(node: fx.Node, inputs: Sequence[fx.Node], module: nn.Module) -> Operation:
    """Return the operation of a module that the graph calls."""
    if type(module) is nn.Dropout:
        dropout: Operation = DropoutOperation(node, inputs)
        labels = range(len(shape_of(node)))
        dropout.for_rows = Labelled(node, inputs, [labels], labels)
        return dropout
    reason = refusal(module)
    return WholeModule(node, inputs, module, reason) if reason else LayerOperation(node, inputs, module)


def refusal(module: nn.Module) -> str:
    """Return why a module stays whole; empty if it can be cut."""
    kind = layer_kind(module)
    if kind is not None:
        return kind.refusal(module)
    if type(module) is nn.Dropout:
        return ""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batch norm mixes rows, and its statistics are those of whole channels"
    if has_hooks(module):
        return "its hooks expect whole tensors"
    reason = f"parallelize does not cut {type(module).__name__}"
    if isinstance(module, _ATTENTIONS):
        reason += ", but nn.Linear and F.scaled_dot_product_attention, of which it can be written"
    return reason


def build(module: nn.Module, choice: LayerLayout, context: TensorContext) -> nn.Module:
    """Return the layer of `choice` on this rank, its parameters uninitialised."""
    parameter = next(module.parameters(), None)
    like: dict[str, Any] = {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}
    place = Place(
        context, Layout(_axis(choice.input), _axis(choice.output)), (_segments(choice.input), _segments(choice.output))
    )
    kind = layer_kind(module)
    assert kind is not None, f"{type(module).__name__} is no layer that is cut"
    return kind.build(module, place, like).train(module.training)


def build_dropout(module: nn.Dropout, state: State, context: TensorContext, *, name: str) -> nn.Module:
    """Return the dropout layer for an activation in layout `state`."""
    cuts = () if state is None else ((state.form.dim, state.axis),)
    return tensor.Dropout(module.p, name=name, context=context, cuts=cuts).train(module.training)


def _unique(whole: Form, forms: Iterable[Form]) -> list[Form]:
    return list(dict.fromkeys([whole, *(f for f in forms if f.dim == whole.dim)]))


def _shards(axes: Sequence[TensorAxis], forms: Sequence[Form], context: TensorContext) -> list[State]:
    shards = [Shard(axis, form) for axis, form in product(axes, forms) if form.divides(context.extent(axis))]
    return [None, *shards]


def _cutting(context: TensorContext) -> list[TensorAxis]:
    return [axis for axis in AXES if context.extent(axis) > 1]


def _segments(state: State) -> tuple[int, ...] | None:
    return None if state is None else state.form.segments


def _axis(state: State) -> TensorAxis | None:
    return None if state is None else state.axis
