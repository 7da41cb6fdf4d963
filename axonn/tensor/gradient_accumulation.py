"""Weight gradients accumulated where they lie: the product of a microbatch is added to `.grad` as it is computed.

Autograd computes each microbatch's weight gradient into new memory and then adds it to `.grad`: for a Linear one write
and one read of the whole gradient too many, for an Embedding a dense gradient of which few rows are not zero.

It also lets a backward be split (zero-bubble schedules: Qi et al., arXiv 2401.10241): the gradients of the weights can
wait in a queue while the gradient of the input is already on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class WeightGradients:
    """The weight gradients of a chunk: computed at once, or kept for later while `deferring` is set."""

    def __init__(self) -> None:
        self.deferring = False
        self._waiting: list[Callable[[], None]] = []

    def add(self, accumulate: Callable[[], None]) -> None:
        """Call `accumulate`, which adds to gradients, now or later."""
        if self.deferring:
            self._waiting.append(accumulate)
        else:
            accumulate()

    def take(self) -> Callable[[], None]:
        """The second half of the backwards since the last call: adds what has been kept, in the order it came."""
        waiting, self._waiting = self._waiting, []

        @torch.no_grad()
        def second_half() -> None:
            for accumulate in waiting:
                accumulate()

        return second_half


def add_product(parameter: nn.Parameter, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add the matrix product a b to the parameter's gradient."""
    if parameter.grad is None:
        parameter.grad = a @ b
    elif parameter.grad.dtype == a.dtype:
        parameter.grad.addmm_(a, b)
    else:
        parameter.grad += a @ b


def add_gradient(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    """Add `gradient` to the parameter's."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def add_rows(parameter: nn.Parameter, accumulate: Callable[[torch.Tensor], Any]) -> None:
    """Call `accumulate` with the parameter's gradient, to which it adds; zeros if there was none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    accumulate(parameter.grad)
