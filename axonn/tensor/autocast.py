"""`torch.autocast` for layers that are autograd functions of their own, with the types that torch's own layers have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def product_inputs(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast the operands of a product or a convolution as `F.linear` and `F.conv2d` do: to autocast's type where it is
    on, all but float64. Autograd sees the casts, so gradients come back in the operands' own types."""
    kind = next(t.device.type for t in tensors if t is not None)
    if not _enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def norm_input(x: torch.Tensor) -> torch.Tensor:
    """Cast the input of a norm as torch's own do: to float32 where autocast is on, but for a CPU's, which take any."""
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if narrow and not x.is_cpu and _enabled(x.device.type) else x


def without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """Inside of the block, what has been cast is not cast again."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if _enabled(kind) else nullcontext()


def _enabled(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
