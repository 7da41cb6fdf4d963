"""AdamW on half-precision parameters with float32 masters, in plain torch: the precision recipe of our engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

HALF = (torch.bfloat16, torch.float16)


class MixedAdamW:
    """PyTorch's fused AdamW on float32 copies of half-precision parameters, which are rounded from them.

    Microbatches accumulate gradients in the parameters' own type, and the step converts them. `masters`: the float32
    weights from which the parameters were rounded; by default the parameters themselves. 20 bytes for each parameter.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, masters: Sequence[torch.Tensor] | None = None, **settings: Any
    ) -> None:
        self._parameters: list[torch.Tensor] = list(parameters)
        if masters is None:
            masters = [p.detach().float() for p in self._parameters]
        self.masters: list[torch.Tensor] = [nn.Parameter(master) for master in masters]
        self._gradients = [torch.zeros_like(master) for master in self.masters]
        for master, gradient in zip(self.masters, self._gradients, strict=True):
            master.grad = gradient
        self._adam = torch.optim.AdamW(self.masters, fused=True, **settings)

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_copy_(self._gradients, gradients)
        self._adam.step()
        torch._foreach_copy_(self._parameters, self.masters)
