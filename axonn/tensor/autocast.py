"""`torch.autocast` for layers that are custom autograd functions, with the types that torch's own layers use."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def product_inputs(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast the operands of a product or a convolution as `F.linear` and `F.conv2d` do under autocast.

    All but float64 are cast to autocast's type. Autograd sees the casts, so gradients have the operands' own types.
    """
    kind = next(t.device.type for t in tensors if t is not None)
    if not _enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def norm_input(x: torch.Tensor) -> torch.Tensor:
    """Cast the input of a norm as torch's norms do under autocast: to float32 on a GPU, not at all on a CPU."""
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if narrow and not x.is_cpu and _enabled(x.device.type) else x


def without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """Switch autocast off inside the block, so that operands are not cast twice."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if _enabled(kind) else nullcontext()


def _enabled(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
