"""Kinds of torch modules that become tensor-parallel layers: `KINDS`."""

from __future__ import annotations

from typing import Any

from torch import nn

from axonn.autoparallel.layer_kinds.base import Features, LayerKind, Place, Shapes
from axonn.autoparallel.layer_kinds.conv_kind import Conv2dKind
from axonn.autoparallel.layer_kinds.embedding_kind import EmbeddingKind
from axonn.autoparallel.layer_kinds.group_norm_kind import GroupNormKind
from axonn.autoparallel.layer_kinds.linear_kind import LinearKind
from axonn.autoparallel.layer_kinds.norm_kinds import LayerNormKind, RMSNormKind

__all__ = ["KINDS", "Features", "LayerKind", "Place", "Shapes", "has_hooks", "layer_kind"]

KINDS: dict[type[nn.Module], LayerKind[Any]] = {
    nn.Linear: LinearKind(),
    nn.Conv2d: Conv2dKind(),
    nn.Embedding: EmbeddingKind(),
    nn.LayerNorm: LayerNormKind(),
    nn.RMSNorm: RMSNormKind(),
    nn.GroupNorm: GroupNormKind(),
}
"""Kinds by class; `layer_kind` finds that of a module."""

_HARMLESS = frozenset(
    ["__init__", "extra_repr", "__repr__", "reset_parameters", "_get_name", "__constants__", *vars(type("_", (), {}))]
)
"""Names that a derived class may define without computing anything else."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Return True if the module has forward or backward hooks, which expect whole tensors."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def layer_kind(module: nn.Module) -> LayerKind[Any] | None:
    """Return the kind of `module`; None if it is none of `KINDS`.

    A derived class is of its base's kind if it inherits everything that the base computes. A module with hooks, or
    whose weight is computed from other parameters, has no kind: it may compute something else.
    """
    base = next((ancestor for ancestor in type(module).__mro__ if ancestor in KINDS), None)
    if base is None or "weight" not in module._parameters or has_hooks(module):
        return None
    inherited = {name for ancestor in base.__mro__ for name in vars(ancestor)} - _HARMLESS
    derived_classes = type(module).__mro__[: type(module).__mro__.index(base)]
    changed = any(name in inherited for derived in derived_classes for name in vars(derived)) or "forward" in vars(
        module
    )
    extra = set(module._parameters) - {"weight", "bias"} or module._buffers or module._modules
    return None if changed or extra else KINDS[base]
