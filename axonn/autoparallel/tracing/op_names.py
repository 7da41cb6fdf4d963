"""Names of operations: one name for a torch function and the method and operator that do the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

ALIASES = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "truediv",
    "ifloordiv": "floordiv",
    "ipow": "pow",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "upsample": "interpolate",
    "view": "reshape",
    "moveaxis": "movedim",
    "clip": "clamp",
    "multiply": "mul",
    "divide": "div",
    "subtract": "sub",
}


def op_name(node: fx.Node) -> str | None:
    """Return the name of a node's operation, the same for function, method and operator; None if not torch's."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = _names().get(node.target, "")  # type: ignore[arg-type]
    else:
        return None
    return ALIASES.get(name, name) or None


@cache
def _names() -> dict[Callable[..., Any], str]:
    names: dict[Callable[..., Any], str] = {getattr: "getattr"}
    for namespace in (torch.Tensor, F, torch, operator, torch.special):
        for name in dir(namespace):
            value = getattr(namespace, name)
            if callable(value) and not name.startswith("__") and not isinstance(value, type):
                names.setdefault(value, name.strip("_"))
    # Of several names of one function, the usual one.
    for name in ("add", "sub", "mul", "truediv", "matmul", "getitem", "pow", "neg", "eq", "lt", "gt", "le", "ge", "ne"):
        names[getattr(operator, name)] = name
    return names
