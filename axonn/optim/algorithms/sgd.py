"""Stochastic gradient descent with momentum (Sutskever et al., ICML 2013, as PyTorch has it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from axonn.config.optimizer_config import OptimizerConfig
from axonn.optim.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch


class SGDConfig(OptimizerConfig):
    """SGD. `weight_decay` is added to the gradient as that of an L2 norm, as in `torch.optim.SGD`. The state is there
    whatever `momentum` is, which so can change between a checkpoint and the run that goes on from it."""

    name: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)

    def model_post_init(self, context: object) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum: set momentum above 0")


class SGD(Algorithm[SGDConfig]):
    """PyTorch's fused SGD."""

    config = SGDConfig
    states = ("momentum_buffer",)
    fused = True
    kernel = "sgd"
    # Weight decay (12), momentum (8 + 12), update (12).
    separate_bytes = 44

    def update(
        self,
        config: SGDConfig,
        master: torch.Tensor,
        gradient: torch.Tensor,
        states: Sequence[torch.Tensor],
        *,
        rate: float,
        number: int,
        overflow: torch.Tensor | None,
    ) -> None:
        from torch.optim.sgd import sgd

        sgd(
            [master],
            [gradient],
            # From zeros, the first update is that of `torch.optim.SGD`, which begins with the gradient itself.
            [states[0]],
            fused=True,
            found_inf=overflow,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            lr=rate,
            dampening=0.0,
            nesterov=config.nesterov,
            maximize=False,
        )
