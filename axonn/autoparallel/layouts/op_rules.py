"""Sharding rules of operations: the cuts they carry from inputs to output, one class per kind of operation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.fx import Node

from axonn.autoparallel.layouts.shardings import Form, Shape, ShardingRule, concatenated, pieces, reshaped, splits

Label = Hashable


def shape_of(node: Node) -> Shape:
    """Return the shape of a node's value for the example."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node} is no tensor"
    return tuple(value.shape)


class Operation:
    """Operation of one node of the graph. `inputs`: the tensors among its arguments, in order, with repetitions.

    This class carries no cuts: its inputs and its output are whole. `reason` says why.
    """

    def __init__(self, node: Node, inputs: Sequence[Node], reason: str = "") -> None:
        self.node = node
        self.inputs = tuple(inputs)
        self.reason = reason
        self.for_rows: Operation = self
        """Operation that carries the rows of a batch, which may be more than it carries between ranks."""

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        """Return the rules in which input number `position` has this form."""
        return []

    def demand(self, form: Form) -> list[ShardingRule]:
        """Return the rules in which the output has this form."""
        return []

    def seeds(self) -> list[ShardingRule]:
        """Return rules worth considering although no input has such a form yet."""
        return []

    def fixes(self, dim: int) -> bool:
        """Return True if the size of this output dim is a number in the code (or another dim's size)."""
        return False

    def localise(self, rule: ShardingRule, extent: int) -> None:
        """Change the node, by now one of the new graph, so that it works on shards."""

    def why_not(self, position: int, form: Form) -> str:
        """Return why it does not take the input in this form."""
        return self.reason or f"it does not keep dim {form.dim} apart"


class Labelled(Operation):
    """An operation that works independently along some dims. Dims with the same label correspond to each other.

    `input_labels`, `labels`: labels of the dims of the inputs and of the output; None for dims that it mixes. Raises
    `ValueError` when the labels do not fit the tensors.
    """

    def __init__(
        self,
        node: Node,
        inputs: Sequence[Node],
        input_labels: Sequence[Sequence[Label]],
        labels: Sequence[Label],
        reason: str = "",
    ) -> None:
        super().__init__(node, inputs, reason)
        self._inputs = [tuple(labels) for labels in input_labels]
        self._output = tuple(labels)
        dims = [len(shape_of(n)) for n in (*inputs, node)]
        if dims != [len(labels) for labels in (*self._inputs, self._output)]:
            raise ValueError(f"{node.format_node()} has tensors of {dims} dims, which is not foreseen")

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        return self._rules(self._inputs[position][form.dim], form.segments)

    def demand(self, form: Form) -> list[ShardingRule]:
        return self._rules(self._output[form.dim], form.segments)

    def _rules(self, label: Label, segments: tuple[int, ...]) -> list[ShardingRule]:
        if label is None or label not in self._output:
            return []
        forms = tuple(Form(labels.index(label), segments) if label in labels else None for labels in self._inputs)
        return [ShardingRule(forms, Form(self._output.index(label), segments))]


def elementwise(node: Node, inputs: Sequence[Node], reason: str = "") -> Labelled:
    """Return an elementwise operation with broadcasting: dims correspond from the last one, those of size 1 expand."""
    shape = shape_of(node)
    sizes = [shape_of(i) for i in inputs]
    labels = [
        [len(s) - d if len(s) <= len(shape) and s[d] == shape[d - len(s)] else None for d in range(len(s))]
        for s in sizes
    ]
    return Labelled(node, inputs, labels, [len(shape) - d for d in range(len(shape))], reason)


class Expand(Labelled):
    """`expand` and `repeat`: elementwise with broadcasting, the new sizes being arguments."""

    def __init__(self, node: Node, inputs: Sequence[Node], sizes: Sequence[Any]) -> None:
        plain = elementwise(node, inputs)
        super().__init__(node, inputs, plain._inputs, plain._output)
        self.sizes = list(sizes)

    def _rules(self, label: Label, segments: tuple[int, ...]) -> list[ShardingRule]:
        # A dim that is expanded is not cut.
        return super()._rules(label, segments) if label in self._inputs[0] else []

    def fixes(self, dim: int) -> bool:
        return isinstance(self.sizes[dim], int) and self.sizes[dim] > 1

    def localise(self, rule: ShardingRule, extent: int) -> None:
        if self.node.target == "expand":
            sizes = list(_sizes_of(self.node))
            sizes[rule.output.dim] = -1
            _set_sizes(self.node, sizes)


class Reshape(Operation):
    """`view`, `reshape`, `flatten`, `unflatten`, `squeeze`, `unsqueeze`: the same elements in the same order."""

    def __init__(self, node: Node, inputs: Sequence[Node], sizes: Sequence[Any] | None) -> None:
        super().__init__(node, inputs)
        self._source, self._target = shape_of(inputs[0]), shape_of(node)
        self._sizes = sizes

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        output = reshaped(form, self._source, self._target)
        return [] if output is None else [ShardingRule((form,), output)]

    def demand(self, form: Form) -> list[ShardingRule]:
        source_form = reshaped(form, self._target, self._source)
        return [] if source_form is None else self.carry(0, source_form)

    def seeds(self) -> list[ShardingRule]:
        return [rule for form in splits(self._source, self._target) for rule in self.demand(form)]

    def fixes(self, dim: int) -> bool:
        return self._sizes is not None and isinstance(self._sizes[dim], int) and self._sizes[dim] > 1

    def localise(self, rule: ShardingRule, extent: int) -> None:
        if self._sizes is None:
            return
        sizes = list(_sizes_of(self.node))
        dim = rule.output.dim
        # An unflatten lists only the new dims.
        first: Any = self.node.args[1] if self.node.target == "unflatten" else 0
        if 0 <= dim - first < len(sizes):
            sizes[dim - first] = divided(self.node, sizes[dim - first], extent)
            _set_sizes(self.node, sizes)

    def why_not(self, position: int, form: Form) -> str:
        return f"{list(self._source)} to {list(self._target)} does not keep the parts of dim {form.dim} together"


class Pieces(Operation):
    """`chunk`, `split` and `unbind`: several tensors from one, along `dim`. `sizes` is None for `unbind`.

    Its value, a tuple, has the form of its input.
    """

    def __init__(self, node: Node, inputs: Sequence[Node], dim: int, sizes: Sequence[int] | None) -> None:
        super().__init__(node, inputs)
        self.dim = dim
        self.sizes = sizes

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        return [ShardingRule((form,), form)] if self.piece(form, 0) is not None else []

    def demand(self, form: Form) -> list[ShardingRule]:
        return self.carry(0, form)

    def seeds(self) -> list[ShardingRule]:
        return [] if self.sizes is None else self.carry(0, Form(self.dim, tuple(self.sizes)))

    def piece(self, form: Form, number: int) -> Form | None:
        """Return the form of piece `number` when the source has `form`; None if a segment crosses its border."""
        if form.dim != self.dim:
            return form._replace(dim=form.dim - (self.sizes is None and form.dim > self.dim))
        cut = None if self.sizes is None else pieces(form, self.sizes)
        return None if cut is None else cut[number]

    def sources(self, form: Form, number: int) -> list[Form]:
        """Return forms of the source with which piece `number` has `form`."""
        if self.sizes is None:
            return [form._replace(dim=form.dim + (form.dim >= self.dim))]
        if form.dim != self.dim:
            return [form]
        only_this = [(size,) if i != number else form.segments for i, size in enumerate(self.sizes)]
        all_alike = [form.segments for _ in self.sizes] if len(set(self.sizes)) == 1 else only_this
        return [Form(self.dim, tuple(s for piece in choice for s in piece)) for choice in (all_alike, only_this)]

    def localise(self, rule: ShardingRule, extent: int) -> None:
        if self.sizes is not None and rule.output.dim == self.dim:
            self.node.target = "split"
            self.node.op = "call_method"
            self.node.args = (self.node.args[0], [size // extent for size in self.sizes])
            self.node.kwargs = {"dim": self.dim}

    def why_not(self, position: int, form: Form) -> str:
        return f"its pieces of dim {self.dim} are not made of whole segments"


class SplitPiece(Operation):
    """One of the tensors of a `Pieces`."""

    def __init__(self, node: Node, inputs: Sequence[Node], source: Pieces, number: int) -> None:
        super().__init__(node, inputs)
        self._source = source
        self._number = number

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        piece = self._source.piece(form, self._number)
        return [] if piece is None else [ShardingRule((form,), piece)]

    def demand(self, form: Form) -> list[ShardingRule]:
        return [rule for f in self._source.sources(form, self._number) for rule in self.carry(0, f)]


class Slice(Operation):
    """Indexing by slices, numbers, None and an ellipsis.

    `kept`: for each dim of the source its dim in the result, and the slice (start, stop) unless it is the full one;
    None for a dim that is dropped or strided.
    """

    def __init__(
        self, node: Node, inputs: Sequence[Node], kept: Sequence[tuple[int, tuple[int, int] | None] | None]
    ) -> None:
        super().__init__(node, inputs)
        self._kept = kept
        self._source = shape_of(inputs[0])

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        kept = self._kept[form.dim]
        if kept is None:
            return []
        dim, borders = kept
        if borders is None:
            return [ShardingRule((form,), form._replace(dim=dim))]
        start, stop = borders
        cut = pieces(form, [start, stop - start, self._source[form.dim] - stop])
        return [] if cut is None or start == stop else [ShardingRule((form,), Form(dim, cut[1].segments))]

    def demand(self, form: Form) -> list[ShardingRule]:
        for source, kept in enumerate(self._kept):
            if kept is not None and kept[0] == form.dim:
                if kept[1] is None:
                    return [ShardingRule((form._replace(dim=source),), form)]
                start, stop = kept[1]
                around = [start, *form.segments, self._source[source] - stop]
                return self.carry(0, Form(source, tuple(n for n in around if n)))
        return []

    def seeds(self) -> list[ShardingRule]:
        sliced_dims = [kept[0] for kept in self._kept if kept is not None and kept[1] is not None]
        return [rule for dim in sliced_dims for rule in self.demand(Form(dim, (shape_of(self.node)[dim],)))]

    def localise(self, rule: ShardingRule, extent: int) -> None:
        form = rule.inputs[0]
        assert form is not None
        kept = self._kept[form.dim]
        if kept is None or kept[1] is None:
            return
        items = list(self.node.args[1]) if isinstance(self.node.args[1], tuple) else [self.node.args[1]]
        start, stop = kept[1]
        number = _item_of(items, form.dim, len(self._source))
        items[number] = slice(start // extent, stop // extent, None)
        self.node.args = (self.node.args[0], tuple(items))

    def why_not(self, position: int, form: Form) -> str:
        return f"what it takes of dim {form.dim} is not made of whole segments"


class Concatenate(Operation):
    """`cat` along `dim`: if that dim is cut, the segments of its inputs follow each other."""

    def __init__(self, node: Node, inputs: Sequence[Node], dim: int) -> None:
        super().__init__(node, inputs)
        self.dim = dim
        self._sizes = [shape_of(i)[dim] for i in inputs]

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        if form.dim != self.dim:
            return [ShardingRule((form,) * len(self.inputs), form)]
        forms = [Form(self.dim, (size,)) for size in self._sizes]
        forms[position] = form
        return [ShardingRule(tuple(forms), concatenated(forms))]

    def demand(self, form: Form) -> list[ShardingRule]:
        if form.dim != self.dim:
            return self.carry(0, form)
        cut = pieces(form, self._sizes)
        return [] if cut is None else [ShardingRule(tuple(cut), form)]


class Gate(Operation):
    """`glu` along `dim`: its first half times the sigmoid of the second."""

    def __init__(self, node: Node, inputs: Sequence[Node], dim: int) -> None:
        super().__init__(node, inputs)
        self.dim = dim

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        if form.dim != self.dim:
            return [ShardingRule((form,), form)]
        half = form.segments[: len(form.segments) // 2]
        return [ShardingRule((form,), Form(self.dim, half))] if half * 2 == form.segments else []

    def demand(self, form: Form) -> list[ShardingRule]:
        return self.carry(0, form if form.dim != self.dim else Form(self.dim, form.segments * 2))

    def seeds(self) -> list[ShardingRule]:
        return self.demand(Form(self.dim, (shape_of(self.node)[self.dim],)))


def divided(node: Node, size: Any, extent: int) -> Any:
    """Return a rank's part of `size`, an argument of `node` of the new graph: a number, -1, or another node."""
    if isinstance(size, Node):
        with node.graph.inserting_before(node):
            return node.graph.call_function(_floordiv, (size, extent))
    return size if size < 0 else size // extent


def _floordiv(size: int, extent: int) -> int:
    return size // extent


def _sizes_of(node: Node) -> Sequence[Any]:
    """Return the sizes among the arguments of a reshape, expand or unflatten, a list made by `unify_shapes`."""
    sizes = node.args[2 if node.target == "unflatten" else 1]
    assert isinstance(sizes, list | tuple)
    return sizes


def _set_sizes(node: Node, sizes: list[Any]) -> None:
    node.args = (*node.args[: 2 if node.target == "unflatten" else 1], sizes)


def _item_of(items: Sequence[Any], dim: int, dims: int) -> int:
    """Return the number of the index item that applies to dim number `dim`."""
    current = 0
    for number, item in enumerate(items):
        if item is Ellipsis:
            current += dims - sum(i is not None and i is not Ellipsis for i in items)
        elif item is not None:
            if current == dim:
                return number
            current += 1
    raise AssertionError(f"{items} says nothing of dim {dim}")
