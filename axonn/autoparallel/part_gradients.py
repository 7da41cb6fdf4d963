"""Gradients of which each rank holds a part, with norms and finiteness tests that agree on all ranks.

`torch.nn.utils.clip_grad_norm_` takes norms of gradients, `torch.amp.GradScaler` tests whether all are finite. Computed
from one rank's parts, each rank would clip or skip by itself, and replicas would silently drift apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from axonn.errors import ConfigError
from axonn.grid import AXES
from axonn.placement import Placement
from axonn.tensor.context import TensorAxis, TensorContext

_TENSOR_AXES: tuple[TensorAxis, ...] = ("row", "col")
_NOT_ELEMENTWISE = tuple(
    getattr(torch.optim, name) for name in ("Adafactor", "LBFGS", "Muon") if hasattr(torch.optim, name)
)


class GradientAgreement:
    """Agreement of the ranks of a grid on averages, norms and finiteness of gradients.

    Made by all ranks in the same order. Copying returns the same object, since a rank has one place in its job.
    """

    def __init__(self, context: TensorContext) -> None:
        self.context = context
        grid = context.grid
        self._data = context.collectives.axis_group(["data"]) if grid.data > 1 else None
        self._everyone = context.collectives.axis_group(AXES) if grid.size > 1 else None
        self._watched = WeakIdKeyDictionary()
        _check_optimizers()

    def __deepcopy__(self, memo: object) -> GradientAgreement:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return GradientAgreement, (self.context,)

    def watch(self, parameters: Mapping[str, nn.Parameter], placements: Mapping[str, Placement]) -> None:
        """Turn each gradient of the trained `parameters` into a `PartGradient` as soon as it has been accumulated."""
        if self._everyone is None:
            return
        for name, parameter in parameters.items():
            if parameter.requires_grad and parameter not in self._watched:
                axes = tuple(axis for axis in _TENSOR_AXES if axis in placements[name].cut_axes)
                parameter.register_post_accumulate_grad_hook(_Mark(self, axes))  # type: ignore[no-untyped-call]
                self._watched[parameter] = axes

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients over the data-parallel ranks; a missing one counts as zero."""
        if self._data is None:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for group in by_dtype.values():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = torch.cat([g.flatten() for g in gradients]).div_(self.context.grid.data)
            self.context.collectives.all_reduce(flat, self._data).wait()
            for parameter, part in zip(group, torch.split(flat, [p.numel() for p in group]), strict=True):
                parameter.grad = PartGradient.of(part.view_as(parameter), self, self._axes(parameter))

    def _axes(self, parameter: nn.Parameter) -> tuple[TensorAxis, ...]:
        axes: tuple[TensorAxis, ...] = self._watched.get(parameter, ())  # type: ignore[no-untyped-call]
        return axes

    def norms(self, gradients: Sequence[torch.Tensor], order: float) -> list[torch.Tensor]:
        """Return the norm of each whole gradient, in its own type, the same on every rank; one collective per axis."""
        local = [torch.linalg.vector_norm(_plain(g), order) for g in gradients]
        axes = [g.axes if isinstance(g, PartGradient) else () for g in gradients]
        if any(isinstance(g, PartGradient) and g.unaveraged for g in gradients):
            raise ConfigError(
                "these gradients are of this rank's rows alone, and so would be their norm; call "
                "average_gradients() of the parallel module before norms are taken or gradients clipped"
            )
        if not any(axes):
            return local
        dtype = torch.float64 if any(n.dtype == torch.float64 for n in local) else torch.float32
        values = torch.stack([n.to(local[0].device, dtype) for n in local])
        for axis in _TENSOR_AXES:
            if any(axis in cut_axes for cut_axes in axes):
                # The norm of the ranks' norms, as torch's own functions combine norms.
                parts = self.context.all_gather(values, axis)
                total = parts.sum(0) if order == 0 else torch.linalg.vector_norm(parts, order, dim=0)
                is_cut = torch.tensor([axis in cut_axes for cut_axes in axes], device=values.device)
                values = torch.where(is_cut, total, values)
        return [value.to(n.device, n.dtype) for value, n in zip(values, local, strict=True)]

    def agree_on_flag(self, flag: torch.Tensor) -> None:
        """Replace `flag` by the maximum over all ranks."""
        if self._everyone is not None:
            self.context.collectives.all_reduce(flag, self._everyone, "max").wait()


class PartGradient(torch.Tensor):
    """The gradient of one rank's shard of a parameter, [shape of the shard].

    It acts as this rank's shard except in norms (`torch.linalg.vector_norm`, `Tensor.norm`, and so
    `torch.nn.utils.clip_grad_norm_` and `get_total_norm`) and in `torch.amp.GradScaler`, which see the whole gradient:
    all ranks of the grid must call these. `axes`: axes along which it is cut. `unaveraged`: True if it has yet to be
    averaged over data-parallel ranks; it has no norm until then.
    """

    agreement: GradientAgreement
    axes: tuple[TensorAxis, ...]
    unaveraged: bool

    @classmethod
    def of(
        cls,
        gradient: torch.Tensor,
        agreement: GradientAgreement,
        axes: tuple[TensorAxis, ...],
        *,
        unaveraged: bool = False,
    ) -> PartGradient:
        """Return `gradient`, in the same memory, as a `PartGradient`."""
        part = gradient.as_subclass(cls)
        part.agreement, part.axes, part.unaveraged = agreement, axes, unaveraged
        return part

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        function = _HANDLED.get(func, func)
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        source = args[0] if args else None
        if (
            isinstance(source, PartGradient)
            and type(result) is torch.Tensor
            and func is not torch.Tensor.as_subclass
            and result.shape == source.shape
            and result.is_floating_point()
        ):
            # So that `p.grad = p.grad / 2` keeps the type.
            return cls.of(result, source.agreement, source.axes, unaveraged=source.unaveraged)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(_plain(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class _Mark:
    """Hook that runs when a parameter's gradient has been accumulated, and makes it a `PartGradient`."""

    def __init__(self, agreement: GradientAgreement, axes: tuple[TensorAxis, ...]) -> None:
        self._agreement = agreement
        self._axes = axes

    def __call__(self, parameter: torch.Tensor) -> None:
        unaveraged = self._agreement.context.grid.data > 1
        gradient = parameter.grad
        if isinstance(gradient, PartGradient):
            gradient.unaveraged = unaveraged
        elif gradient is not None and not gradient.is_sparse:
            parameter.grad = PartGradient.of(gradient, self._agreement, self._axes, unaveraged=unaveraged)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def _agreement_of(tensors: Sequence[Any]) -> GradientAgreement:
    return next(t.agreement for t in tensors if isinstance(t, PartGradient))


def _vector_norm(x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> torch.Tensor:
    _check_whole(x, dim)
    (norm,) = _agreement_of([x]).norms([x], ord)
    norm = norm.to(options.get("dtype") or norm.dtype)
    return norm.reshape([1] * x.dim()) if keepdim else norm


def _norm(  # noqa: PLR0917 (the signature of torch.norm)
    x: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: None = None, dtype: Any = None
) -> torch.Tensor:
    if p == "nuc":
        _check_whole(x, "nuc")
    return _vector_norm(x, 2 if p in ("fro", None) else p, dim, keepdim, dtype=dtype)


def _linalg_norm(A: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, **options: Any) -> torch.Tensor:
    if ord is not None and A.dim() > 1:
        _check_whole(A, ord)
    return _vector_norm(A, 2 if ord is None else ord, dim, keepdim, **options)


def _foreach_norm(tensors: Sequence[Any], ord: Any = 2, dtype: Any = None) -> tuple[torch.Tensor, ...]:
    norms = _agreement_of(tensors).norms(tensors, ord)
    return tuple(norm.to(dtype or norm.dtype) for norm in norms)


def _check_whole(x: Any, dim: Any) -> None:
    if dim is not None and isinstance(x, PartGradient):
        raise ConfigError(
            "this rank has a part of the gradient, whose norm along some dims, or as a matrix, is not that of the "
            "whole; take the norm of all of it, or p.grad.as_subclass(torch.Tensor) if the part is meant"
        )


def _unscale(tensors: Sequence[Any], found_inf: torch.Tensor, inverse_scale: torch.Tensor) -> None:
    """Unscale as `GradScaler` does, with one `found_inf` for all ranks."""
    torch._amp_foreach_non_finite_check_and_unscale_([_plain(t) for t in tensors], found_inf, inverse_scale)
    _agreement_of(tensors).agree_on_flag(found_inf)


_HANDLED: dict[Any, Callable[..., Any]] = {
    torch.linalg.vector_norm: _vector_norm,
    torch.linalg.norm: _linalg_norm,
    torch.norm: _norm,
    torch.Tensor.norm: _norm,
    torch._foreach_norm: _foreach_norm,
    torch._amp_foreach_non_finite_check_and_unscale_: _unscale,
}


@cache
def _check_optimizers() -> None:
    """Register, once per process, the check that gradients are averaged and the optimizer is elementwise."""
    register_optimizer_step_pre_hook(_check_step)


def _check_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    parts = [g for g in gradients if isinstance(g, PartGradient)]
    if any(g.unaveraged for g in parts):
        raise ConfigError(
            "the gradients are of this rank's rows alone, and replicas would drift apart; call average_gradients() of "
            "the parallel module before the optimizer's step"
        )
    if isinstance(optimizer, _NOT_ELEMENTWISE) and any(g.axes for g in parts):
        raise ConfigError(
            f"{type(optimizer).__name__} takes norms or products of whole parameters, of which a rank has parts; use "
            "an elementwise optimizer, such as torch.optim.AdamW or torch.optim.SGD"
        )
