"""In-place accumulation of weight gradients: the gradient of a microbatch is added to `.grad` as it is computed.

Autograd would compute each microbatch's weight gradient into new memory and then add it to `.grad`: for a Linear one
write and one read of the whole gradient too many, for an Embedding a dense gradient with few non-zero rows.

This also allows a split backward (zero-bubble schedules: Qi et al., arXiv 2401.10241): the weight gradients can wait in
a queue while the input gradient is already on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class WeightGradients:
    """Queue of a chunk's weight gradients: computed at once, or deferred while `deferring` is set."""

    def __init__(self) -> None:
        self.deferring = False
        self._deferred: list[Callable[[], None]] = []

    def add(self, accumulate: Callable[[], None]) -> None:
        """Call `accumulate`, which adds to gradients, now or, while deferring, later."""
        if self.deferring:
            self._deferred.append(accumulate)
        else:
            accumulate()

    def take(self) -> Callable[[], None]:
        """Return the weight half of the backwards since the last call: it runs what was deferred, in order."""
        deferred, self._deferred = self._deferred, []

        @torch.no_grad()
        def weight_half() -> None:
            for accumulate in deferred:
                accumulate()

        return weight_half


def add_product(parameter: nn.Parameter, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add the matrix product a b to the parameter's gradient."""
    if parameter.grad is None:
        parameter.grad = a @ b
    elif parameter.grad.dtype == a.dtype:
        parameter.grad.addmm_(a, b)
    else:
        parameter.grad += a @ b


def add_gradient(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    """Add `gradient` to the parameter's gradient."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def add_rows(parameter: nn.Parameter, accumulate: Callable[[torch.Tensor], Any]) -> None:
    """Call `accumulate`, which adds rows, with the parameter's gradient; it starts as zeros if there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    accumulate(parameter.grad)
