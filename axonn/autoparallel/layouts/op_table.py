"""Table of the known torch operations and of the dims along which they work independently."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from axonn.autoparallel.layouts.op_rules import (
    Concatenate,
    Expand,
    Gate,
    Label,
    Labelled,
    Operation,
    Pieces,
    Reshape,
    Slice,
    SplitPiece,
    elementwise,
    shape_of,
)
from axonn.autoparallel.tracing.op_names import op_name

_ELEMENTWISE_NAMES = """
    abs acos add addcdiv addcmul alpha_dropout and and_ asin atan atan2 bfloat16 bitwise_and bitwise_not bitwise_or
    bool ceil celu clamp clamp_max clamp_min clone contiguous cos cosh detach div double dropout dropout1d dropout2d
    dropout3d elu eq erf erfc exp exp2 expand_as expm1 feature_alpha_dropout float floor floor_divide floordiv
    full_like ge gelu gt half hardshrink hardsigmoid hardswish hardtanh int invert isfinite isinf isnan le
    leaky_relu lerp log log10 log1p log2 logical_and logical_not logical_or logical_xor logit logsigmoid long lt
    masked_fill maximum minimum mish mod mul nan_to_num ne neg negative not ones_like or or_ pos pow reciprocal relu
    relu6 remainder requires_grad round rsqrt rsub selu sgn sigmoid sign silu sin sinh softplus softshrink softsign
    sqrt square sub tan tanh tanhshrink threshold to true_divide truediv trunc type type_as where xlogy xor
    zeros_like
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())
_REDUCTIONS = frozenset(
    ["all", "amax", "amin", "any", "argmax", "argmin", "logsumexp", "max", "mean", "min", "prod", "std", "sum", "var"]
)
_ALONG = frozenset(
    ["cumprod", "cumsum", "flip", "log_softmax", "logcumsumexp", "normalize", "roll", "softmax", "softmin"]
)
_POOLS = frozenset(["avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool"])


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the arguments of a node that are tensors or tuples of tensors, with repetitions."""
    inputs: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: inputs.append(n) if is_tensor(n) else None)
    return inputs


def is_tensor(node: fx.Node) -> bool:
    """Return True if the value of a node is a tensor or a tuple of tensors."""
    value = node.meta.get("val")
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)


def operation_of(node: fx.Node, known: dict[fx.Node, Operation]) -> Operation:
    """Return the operation of a function or method call. `known`: the operations of the nodes before it."""
    inputs = tensor_inputs(node)
    kind = op_name(node)
    if not is_tensor(node) or not inputs:
        return Operation(node, inputs, "its result is no tensor" if inputs else "")
    if kind is None:
        return Operation(node, inputs, f"{_shown(node)} is not an operation that is known")
    try:
        operation = _operation(node, kind, inputs, known)
    except (IndexError, KeyError, TypeError, ValueError):
        # Unforeseen arguments: no cut is carried.
        operation = None
    return operation or Operation(node, inputs, f"{kind} with these arguments is not an operation that is known")


def _operation(node: fx.Node, kind: str, inputs: list[fx.Node], known: dict[fx.Node, Operation]) -> Operation | None:
    if kind == "getitem":
        return _getitem(node, inputs, known)
    if kind in ("chunk", "split", "tensor_split", "unbind"):
        return _pieces(node, kind, inputs)
    if not isinstance(node.meta["val"], torch.Tensor):
        return None
    if kind in _ELEMENTWISE:
        return elementwise(node, inputs)
    if kind in ("reshape", "flatten", "unflatten", "squeeze", "unsqueeze"):
        return Reshape(node, inputs, _sizes(node, kind))
    if kind in ("expand", "repeat"):
        return Expand(node, inputs, node.args[1])  # type: ignore[arg-type]
    dims = shape_of(inputs[0])
    same = list(range(len(dims)))
    if kind in ("permute", "transpose", "t", "movedim") or (kind == "getattr" and node.args[1] in ("T", "mT")):
        return Labelled(node, inputs, [same], _permuted(node, kind, same))
    if kind in _ALONG:
        return _without(node, inputs, same, _dims(node, {"roll": 2, "normalize": 2}.get(kind, 1), len(dims)), kind)
    if kind in _REDUCTIONS:
        return _reduction(node, inputs, same, kind)
    if kind == "glu":
        return Gate(node, inputs, int(_argument(node, 1, "dim", -1)) % len(dims))
    if kind == "cat":
        return Concatenate(node, inputs, int(_argument(node, 1, "dim", 0)) % len(dims))
    if kind == "stack":
        dim = int(_argument(node, 1, "dim", 0)) % (len(dims) + 1)
        return Labelled(node, inputs, [same] * len(inputs), [*same[:dim], None, *same[dim:]])
    if kind in ("matmul", "bmm", "mm"):
        return _matmul(node, inputs)
    if kind == "einsum":
        return _einsum(node, inputs)
    if kind == "scaled_dot_product_attention":
        return _attention(node, inputs)
    spatial = _spatial(node, kind, len(dims))
    if spatial is None:
        return None
    kept = len(dims) - spatial
    labels = [label if d < kept else None for d, label in enumerate(same)]
    return Labelled(node, inputs, [labels], labels, f"{kind} works along the last {spatial} dims")


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _dims(node: fx.Node, position: int, count: int) -> set[int]:
    """Return the argument `dim` (or `dims`) as a set; all dims if there is none."""
    dims = _argument(node, position, "dim")
    dims = dims if dims is not None else node.kwargs.get("dims")
    if dims is None and op_name(node) == "normalize":
        dims = 1
    if dims is None:
        return set(range(count))
    if isinstance(dims, int) and op_name(node) == "flip":
        dims = node.args[1:]
    return {d % count for d in ((dims,) if isinstance(dims, int) else dims)}


def _sizes(node: fx.Node, kind: str) -> list[Any] | None:
    """Return the size of each dim of the result as written in the code; -1 where it follows from the input."""
    if kind == "reshape":
        return list(node.args[1])  # type: ignore[arg-type]
    if kind != "unflatten":
        return None
    dim, sizes = node.args[1], node.args[2]
    after = len(shape_of(node)) - dim - len(sizes)  # type: ignore[arg-type, operator]
    return [-1] * dim + list(sizes) + [-1] * after  # type: ignore[arg-type, operator]


def _without(node: fx.Node, inputs: list[fx.Node], labels: Sequence[Label], mixed: set[int], kind: str) -> Labelled:
    kept = [None if d in mixed else label for d, label in enumerate(labels)]
    return Labelled(node, inputs, [kept], kept, f"{kind} works along dim {', '.join(map(str, sorted(mixed)))}")


def _reduction(node: fx.Node, inputs: list[fx.Node], same: list[int], kind: str) -> Operation | None:
    if len(inputs) > 1:
        return elementwise(node, inputs) if kind in ("max", "min") else None
    reduced = _dims(node, 1, len(same))
    keep = len(shape_of(node)) == len(same)
    output = [None if d in reduced else d for d in same if keep or d not in reduced]
    reason = f"{kind} reduces dim {', '.join(map(str, sorted(reduced)))}"
    return Labelled(node, inputs, [[None if d in reduced else d for d in same]], output, reason)


def _permuted(node: fx.Node, kind: str, same: list[int]) -> list[int]:
    count = len(same)
    if kind == "permute":
        order: Any = node.args[1:] if len(node.args) > 2 else _argument(node, 1, "dims")
        order = (order,) if isinstance(order, int) else order[0] if isinstance(order[0], list | tuple) else order
        return [same[d % count] for d in order]
    if kind in ("t", "getattr"):
        if kind == "getattr" and node.args[1] == "T":
            return same[::-1]
        first, second = count - 2, count - 1
    elif kind == "movedim":
        source, to = (_argument(node, i, name) for i, name in ((1, "source"), (2, "destination")))
        moved = [same[i] for i in same if i != source % count]
        moved.insert(to % count, source % count)
        return moved
    else:
        first = _argument(node, 1, "dim0") % count
        second = _argument(node, 2, "dim1") % count
    swapped = list(same)
    swapped[first], swapped[second] = same[second], same[first]
    return swapped


def _matmul(node: fx.Node, inputs: list[fx.Node]) -> Operation | None:
    a, b = (len(shape_of(i)) for i in inputs)
    if min(a, b) < 2:
        return None
    out = shape_of(node)
    batch = len(out) - 2

    def leading(shape: Sequence[int]) -> list[Label]:
        offset = batch - (len(shape) - 2)
        return [d + offset if size == out[d + offset] else None for d, size in enumerate(shape[:-2])]

    first, second = leading(shape_of(inputs[0])), leading(shape_of(inputs[1]))
    labels = [[*first, "m", None], [*second, None, "n"]]
    return Labelled(node, inputs, labels, [*range(batch), "m", "n"], "a product sums over that dim")


def _einsum(node: fx.Node, inputs: list[fx.Node]) -> Operation | None:
    equation = node.args[0]
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    left, output = equation.replace(" ", "").split("->")
    terms = left.split(",")
    # A label that occurs twice in one term is a diagonal.
    labels = [[c if c in output and term.count(c) == 1 else None for c in term] for term in terms]
    complete = all(c in "".join(map(str, labels)) for c in output)
    return Labelled(node, inputs, labels, list(output), "the product sums over that dim") if complete else None


def _attention(node: fx.Node, inputs: list[fx.Node]) -> Operation | None:
    q, k, v = (shape_of(i) for i in inputs[:3])
    if _argument(node, 7, "enable_gqa", False) or not len(q) == len(k) == len(v):
        return None
    batch = list(range(len(q) - 2))

    def leading(shape: Sequence[int]) -> list[Label]:
        """Return labels of the batch dims only."""
        offset = len(q) - len(shape)
        return [
            d + offset if d < len(shape) - 2 and size == shape_of(node)[d + offset] else None
            for d, size in enumerate(shape)
        ]

    labels = [leading(shape_of(i)) for i in inputs]
    return Labelled(node, inputs, labels, [*batch, None, None], "attention mixes positions and features of a head")


def _spatial(node: fx.Node, kind: str, dims: int) -> int | None:
    """Return how many last dims pooling, interpolation or padding work along; None for other operations."""
    for pool in _POOLS:
        if kind.startswith(pool) and kind[len(pool) :] in ("1d", "2d", "3d"):
            return int(kind[len(pool)])
    if kind == "interpolate":
        return dims - 2
    if kind == "pad":
        sizes = _argument(node, 1, "pad")
        return len(sizes) // 2
    return None


def _pieces(node: fx.Node, kind: str, inputs: list[fx.Node]) -> Operation | None:
    source = shape_of(inputs[0])
    dim = int(_argument(node, 1, "dim", 0) if kind == "unbind" else _argument(node, 2, "dim", 0)) % len(source)
    values = node.meta["val"]
    return Pieces(node, inputs, dim, None if kind == "unbind" else [v.shape[dim] for v in values])


def _getitem(node: fx.Node, inputs: list[fx.Node], known: dict[fx.Node, Operation]) -> Operation | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    index = node.args[1]
    if isinstance(source.meta["val"], list | tuple):
        operation = known.get(source)
        return SplitPiece(node, inputs, operation, int(index)) if isinstance(operation, Pieces) else None  # type: ignore[arg-type]
    items = list(index) if isinstance(index, tuple) else [index]
    if len(inputs) > 1 or not all(i is None or i is Ellipsis or isinstance(i, int | slice | fx.Node) for i in items):
        return None
    sizes = shape_of(source)
    missing = len(sizes) - sum(i is not None and i is not Ellipsis for i in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    kept: list[tuple[int, tuple[int, int] | None] | None] = []
    dim = 0
    for item in items:
        if item is None:
            dim += 1
        elif item is Ellipsis:
            kept += [(dim + i, None) for i in range(missing)]
            dim += missing
        elif isinstance(item, slice):
            kept.append(_slice(item, sizes[len(kept)], dim))
            dim += 1
        else:
            kept.append(None)
    return Slice(node, inputs, kept)


def _slice(item: slice, size: int, dim: int) -> tuple[int, tuple[int, int] | None] | None:
    if item == slice(None):
        return dim, None
    parts = (item.start, item.stop, item.step)
    if any(isinstance(p, fx.Node) for p in parts):
        return None
    start, stop, step = item.indices(size)
    return (dim, (start, stop)) if step == 1 else None


def _shown(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return str(name)


def elements(node: fx.Node) -> int:
    """Return the number of elements of a node's value for the example, summed over a tuple."""
    value = node.meta["val"]
    tensors = value if isinstance(value, list | tuple) else [value]
    return sum(math.prod(t.shape) for t in tensors if isinstance(t, torch.Tensor))
