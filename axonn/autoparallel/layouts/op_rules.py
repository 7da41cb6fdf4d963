"""Which cuts an operation carries from its inputs to its output, one class for each kind of operation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.fx import Node

from axonn.autoparallel.layouts.shardings import Form, Shape, ShardingRule, concatenated, pieces, reshaped, splits

Label = Hashable


def shape_of(node: Node) -> Shape:
    """Of the example's value."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node} is no tensor"
    return tuple(value.shape)


class Operation:
    """One node of the graph. `inputs`: the tensors among its arguments, as often as they occur, in their order.

    This class carries nothing: its inputs and its output are whole. `reason` says why.
    """

    def __init__(self, node: Node, inputs: Sequence[Node], reason: str = "") -> None:
        self.node = node
        self.inputs = tuple(inputs)
        self.reason = reason
        self.alike: Operation = self
        """What it is to rows, of which it may carry a cut although it does not carry one between ranks."""

    def carry(self, position: int, form: Form) -> list[ShardingRule]:
        """The ways in which it takes input number `position` in this form."""
        return []

    def demand(self, form: Form) -> list[ShardingRule]:
        """The ways in which its output gets this form."""
        return []

    def seeds(self) -> list[ShardingRule]:
        """Ways that are worth considering although no input comes in such a form yet."""
        return []

    def fixes(self, dim: int) -> bool:
        """Whether the size of this dim of the output is a number written in the code (or another dim's size)."""
        return False

    def localise(self, link: ShardingRule, extent: int) -> None:
        """Change the node, which is one of the new graph by now, so that it works on parts."""

    def why_not(self, position: int, form: Form) -> str:
        """Why it does not take the input in this form."""
        return self.reason or f"it does not keep dim {form.dim} apart"


class Labelled(Operation):
    """An operation that treats all places along some dims alike. Dims with the same label run along each other.

    `inputs_labels`, `labels`: of the dims of the inputs and of the output; None for those along which it mixes.
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
        return self._link(self._inputs[position][form.dim], form.segments)

    def demand(self, form: Form) -> list[ShardingRule]:
        return self._link(self._output[form.dim], form.segments)

    def _link(self, label: Label, segments: tuple[int, ...]) -> list[ShardingRule]:
        if label is None or label not in self._output:
            return []
        forms = tuple(Form(labels.index(label), segments) if label in labels else None for labels in self._inputs)
        return [ShardingRule(forms, Form(self._output.index(label), segments))]


def elementwise(node: Node, inputs: Sequence[Node], reason: str = "") -> Labelled:
    """Of broadcast inputs: dims are counted from the last one, those of size 1 are spread."""
    shape = shape_of(node)
    sizes = [shape_of(i) for i in inputs]
    labels = [
        [len(s) - d if len(s) <= len(shape) and s[d] == shape[d - len(s)] else None for d in range(len(s))]
        for s in sizes
    ]
    return Labelled(node, inputs, labels, [len(shape) - d for d in range(len(shape))], reason)


class Expand(Labelled):
    """`expand` and `repeat`: as `elementwise` does, the new sizes being arguments."""

    def __init__(self, node: Node, inputs: Sequence[Node], sizes: Sequence[Any]) -> None:
        plain = elementwise(node, inputs)
        super().__init__(node, inputs, plain._inputs, plain._output)
        self.sizes = list(sizes)

    def _link(self, label: Label, segments: tuple[int, ...]) -> list[ShardingRule]:
        # What is spread along a dim is not cut in it.
        return super()._link(label, segments) if label in self._inputs[0] else []

    def fixes(self, dim: int) -> bool:
        return isinstance(self.sizes[dim], int) and self.sizes[dim] > 1

    def localise(self, link: ShardingRule, extent: int) -> None:
        if self.node.target == "expand":
            sizes = list(_sizes_of(self.node))
            sizes[link.output.dim] = -1
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
        found = reshaped(form, self._target, self._source)
        return [] if found is None else self.carry(0, found)

    def seeds(self) -> list[ShardingRule]:
        return [link for form in splits(self._source, self._target) for link in self.demand(form)]

    def fixes(self, dim: int) -> bool:
        return self._sizes is not None and isinstance(self._sizes[dim], int) and self._sizes[dim] > 1

    def localise(self, link: ShardingRule, extent: int) -> None:
        if self._sizes is None:
            return
        sizes = list(_sizes_of(self.node))
        dim = link.output.dim
        # An unflatten lists the new dims alone.
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
        """That of a piece when the source has `form`."""
        if form.dim != self.dim:
            return form._replace(dim=form.dim - (self.sizes is None and form.dim > self.dim))
        cut = None if self.sizes is None else pieces(form, self.sizes)
        return None if cut is None else cut[number]

    def sources(self, form: Form, number: int) -> list[Form]:
        """Forms of the source of which piece `number` has `form`."""
        if self.sizes is None:
            return [form._replace(dim=form.dim + (form.dim >= self.dim))]
        if form.dim != self.dim:
            return [form]
        parts = [(size,) if i != number else form.segments for i, size in enumerate(self.sizes)]
        alike = [form.segments for size in self.sizes] if len(set(self.sizes)) == 1 else parts
        return [Form(self.dim, tuple(s for part in found for s in part)) for found in (alike, parts)]

    def localise(self, link: ShardingRule, extent: int) -> None:
        if self.sizes is not None and link.output.dim == self.dim:
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
        return [link for f in self._source.sources(form, self._number) for link in self.carry(0, f)]


class Slice(Operation):
    """Indexing by slices, numbers, None and an ellipsis. `kept`: of each dim of the source, that of the result, and
    the slice (start, stop) if it is a proper one; None for a dim that is no longer there or strided."""

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
        proper = [kept[0] for kept in self._kept if kept is not None and kept[1] is not None]
        return [link for dim in proper for link in self.demand(Form(dim, (shape_of(self.node)[dim],)))]

    def localise(self, link: ShardingRule, extent: int) -> None:
        form = link.inputs[0]
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
    """`cat` along `dim`: cut in that dim, the segments of its inputs follow each other."""

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
    """`glu` along `dim`: the first half of it times the sigmoid of the second."""

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
    """A part of `size`, an argument of `node` of the new graph: a number, -1, or another node."""
    if isinstance(size, Node):
        with node.graph.inserting_before(node):
            return node.graph.call_function(_floordiv, (size, extent))
    return size if size < 0 else size // extent


def _floordiv(size: int, extent: int) -> int:
    return size // extent


def _sizes_of(node: Node) -> Sequence[Any]:
    """The sizes among the arguments of a view, reshape, expand or unflatten, which `table` has put in one list."""
    sizes = node.args[2 if node.target == "unflatten" else 1]
    assert isinstance(sizes, list | tuple)
    return sizes


def _set_sizes(node: Node, sizes: list[Any]) -> None:
    node.args = (*node.args[: 2 if node.target == "unflatten" else 1], sizes)


def _item_of(items: Sequence[Any], dim: int, dims: int) -> int:
    """Number of the item of an index that is for dim number `dim`."""
    at = 0
    for number, item in enumerate(items):
        if item is Ellipsis:
            at += dims - sum(i is not None and i is not Ellipsis for i in items)
        elif item is not None:
            if at == dim:
                return number
            at += 1
    raise AssertionError(f"{items} says nothing of dim {dim}")
