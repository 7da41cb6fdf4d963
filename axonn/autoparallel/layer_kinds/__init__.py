"""Which modules of torch become tensor-parallel layers: `KINDS`."""

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
"""By the class itself; `layer_kind` says of a module whether it is one of them."""

_HARMLESS = frozenset(
    ["__init__", "extra_repr", "__repr__", "reset_parameters", "_get_name", "__constants__", *vars(type("_", (), {}))]
)
"""What a derived class may define without computing anything else."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether functions run before or after the module's forward or backward, which expect whole tensors."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def layer_kind(module: nn.Module) -> LayerKind[Any] | None:
    """How `module` is cut; None for what is none of `KINDS`.

    A derived class is of the kind of its base where it inherits all of what that computes. A module with hooks, or
    whose weight is computed from other parameters, is none: it may compute something else.
    """
    base = next((ancestor for ancestor in type(module).__mro__ if ancestor in KINDS), None)
    if base is None or "weight" not in module._parameters or has_hooks(module):
        return None
    inherited = {name for ancestor in base.__mro__ for name in vars(ancestor)} - _HARMLESS
    before = type(module).__mro__[: type(module).__mro__.index(base)]
    changed = any(name in inherited for derived in before for name in vars(derived)) or "forward" in vars(module)
    extra = set(module._parameters) - {"weight", "bias"} or module._buffers or module._modules
    return None if changed or extra else KINDS[base]
