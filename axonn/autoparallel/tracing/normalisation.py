"""Normalisation of a traced graph, so that every operation is expressed in only one way.

Afterwards nothing happens in place, sizes are lists, and every dropout is a named module.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from axonn.autoparallel.tracing.op_names import ALIASES, op_name
from axonn.autoparallel.tracing.source_lines import location
from axonn.errors import ConfigError

_RESHAPES = ("reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_VIEWS = (*_RESHAPES, "permute", "transpose", "t", "getitem", "chunk", "split", "unbind", "expand", "movedim", "detach")

_DROPOUT = (1, "p", 0.5), (2, "training", True)
_RANDOM_NAMES = """
    alpha_dropout bernoulli dropout1d dropout2d dropout3d exponential feature_alpha_dropout gumbel_softmax
    multinomial normal poisson rand rand_like randint randint_like randn randn_like randperm rrelu uniform
"""
_RANDOM = frozenset(_RANDOM_NAMES.split())


def make_functional(graph: fx.Graph) -> None:
    """Replace in-place operations by ones that make a new tensor, and let later readers read that.

    Raises `ConfigError` for operations where this is impossible.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        plain = _out_of_place(node, name)
        if op_name(node) == "setitem" or plain is None:
            raise ConfigError(
                f"{name} changes a tensor in place{location(node)}, which cannot be followed through a graph; "
                "write it without, for instance with torch.where or torch.cat"
            )
        changed = node.args[0] if node.args else None
        if (plain is node.target and not node.kwargs.get("inplace")) or not isinstance(changed, fx.Node):
            continue
        node.target = plain
        if not isinstance(changed.meta["val"], torch.Tensor):
            continue
        if changed.op == "get_attr":
            raise ConfigError(
                f"{name} changes {changed.target} of the module{location(node)}, which every rank holds; "
                "change it outside"
            )
        _check_aliases(node, changed, order)
        if "inplace" in node.kwargs:
            node.kwargs = {**node.kwargs, "inplace": False}
        changed.replace_all_uses_with(node, lambda user, after=order[node]: order[user] > after)  # type: ignore[misc]


def _out_of_place(node: fx.Node, name: str) -> Any:
    """Return the out-of-place function or method of a node; None if there is none."""
    if node.op == "call_function" and name in ALIASES and getattr(operator, name, None) is node.target:
        return getattr(operator, ALIASES[name])
    if not name.endswith("_") or name.endswith("__"):
        return node.target
    if node.op == "call_method":
        return name[:-1] if hasattr(torch.Tensor, name[:-1]) else None
    return getattr(F, name[:-1], None) or getattr(torch, name[:-1], None) or getattr(operator, name, None)


def _check_aliases(node: fx.Node, changed: fx.Node, order: Mapping[fx.Node, int]) -> None:
    """Raise `ConfigError` if another view of `changed` is read after `node` has changed it."""
    after = order[node]
    source: Any = changed
    while isinstance(source, fx.Node) and op_name(source) in _VIEWS:
        source = source.args[0]
        readers = [u for u in source.users if order[u] > after] if isinstance(source, fx.Node) else []
        if readers:
            break
    else:
        readers = [
            user for view in changed.users if op_name(view) in _VIEWS for user in view.users if order[user] > after
        ]
    if readers:
        raise ConfigError(
            f"{node.name} changes a tensor in place{location(node)} of which {readers[0].name} reads another view"
            f"{location(readers[0])}; write it without in-place operations"
        )


def unify_shapes(graph: fx.Graph) -> None:
    """Make shape operations methods with one list of sizes: a node or a number for each dim."""
    for node in list(graph.nodes):
        kind = op_name(node)
        if kind == "reshape" and not (len(node.args) > 1 and isinstance(node.args[1], torch.dtype)):
            _set_method(node, "reshape", _size_list(node, 1, "shape"))
        elif kind in ("expand", "repeat"):
            _set_method(node, kind, _size_list(node, 1, "size" if kind == "expand" else "repeats"))
        elif kind == "unflatten":
            dim = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
            sizes = node.args[2] if len(node.args) > 2 else node.kwargs["sizes"]
            _set_method(node, "unflatten", dim % node.args[0].meta["val"].dim(), list(sizes))
        elif kind == "squeeze" and len(node.args) == 1 and not node.kwargs:
            shape = node.args[0].meta["val"].shape
            _set_method(node, "squeeze", tuple(d for d, size in enumerate(shape) if size == 1))


def name_dropouts(root: fx.GraphModule) -> None:
    """Turn every `F.dropout` into a named module. Raises `ConfigError` for other random operations."""
    number = 0
    for node in root.graph.nodes:
        kind = op_name(node)
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if kind == "dropout":
            p: Any
            p, training = (node.args[i] if len(node.args) > i else node.kwargs.get(n, d) for i, n, d in _DROPOUT)
            if not p or not training:
                continue
            while hasattr(root, f"dropout{number}"):
                number += 1
            root.add_submodule(f"dropout{number}", nn.Dropout(float(p)))
            node.op, node.target = "call_module", f"dropout{number}"
            node.args, node.kwargs = (node.args[0],), {}
        elif kind in _RANDOM or (kind == "scaled_dot_product_attention" and _attention_dropout(node)):
            raise ConfigError(
                f"{kind} ({node.name}) draws random numbers{location(node)}, which would differ between ranks; use "
                "nn.Dropout, whose masks are counter-based, or draw them outside and pass them in"
            )
        elif type(module) is not nn.Dropout and _has_dropout(module):
            raise ConfigError(
                f"{node.target} ({type(module).__name__}) has dropout of its own{location(node)}, which would differ "
                "between ranks; set it to 0"
            )
        elif kind in ("batch_norm", "instance_norm") and _follows_a_mode(node):
            raise ConfigError(
                f"F.{kind} of running statistics is recorded as it is in training{location(node)}, and would stay so "
                "after eval(); use nn.BatchNorm2d, or a class derived of it, which stays whole and follows the mode"
            )


def _has_dropout(module: nn.Module | None) -> bool:
    submodules = [] if module is None else list(module.modules())
    probabilities = [
        p.p if isinstance(p, nn.modules.dropout._DropoutNd) else getattr(p, "dropout", 0) for p in submodules
    ]
    return any(isinstance(p, int | float) and p > 0 for p in probabilities)


def _follows_a_mode(node: fx.Node) -> bool:
    """Return True if it updates running statistics, as norms do only in training."""
    running = node.args[1] if len(node.args) > 1 else node.kwargs.get("running_mean")
    name, position = ("training", 5) if op_name(node) == "batch_norm" else ("use_input_stats", 5)
    training = node.args[position] if len(node.args) > position else node.kwargs.get(name, name != "training")
    return running is not None and bool(training)


def _attention_dropout(node: fx.Node) -> Any:
    return node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)


def _set_method(node: fx.Node, name: str, *arguments: Any) -> None:
    node.op, node.target = "call_method", name
    node.args, node.kwargs = (node.args[0], *arguments), {}


def _size_list(node: fx.Node, first: int, keyword: str) -> list[Any]:
    sizes: Any = node.args[first:] if len(node.args) > first else (node.kwargs[keyword],)
    if len(sizes) == 1 and not isinstance(sizes[0], int):
        if isinstance(sizes[0], list | tuple):
            return list(sizes[0])
        value = sizes[0].meta.get("val")
        if isinstance(value, int):
            return [sizes[0]]
        with node.graph.inserting_before(node):
            items = [node.graph.call_function(operator.getitem, (sizes[0], dim)) for dim in range(len(value))]
        for item, size in zip(items, value, strict=True):
            item.meta["val"] = size
        return list(items)
    return list(sizes)
