"""AdamW (Loshchilov & Hutter, ICLR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from axonn.config.optimizer_config import OptimizerConfig
from axonn.optim.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch


class AdamWConfig(OptimizerConfig):
    """AdamW; the defaults are those of IPDPS'22, section VI-C."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = Field(default=(0.9, 0.999), strict=False)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)


class AdamW(Algorithm[AdamWConfig]):
    """PyTorch's fused AdamW."""

    config = AdamWConfig
    states = ("exp_avg", "exp_avg_sq")
    fused = True
    kernel = "adam"
    # Weight decay (8), two moments (20 + 20), denominator (24), update (16).
    separate_bytes = 88

    def update(
        self,
        config: AdamWConfig,
        master: torch.Tensor,
        gradient: torch.Tensor,
        states: Sequence[torch.Tensor],
        *,
        rate: float,
        number: int,
        overflow: torch.Tensor | None,
    ) -> None:
        import torch
        from torch.optim.adamw import adamw

        # It adds one to the count that it is given.
        before = torch.full((), number - 1, dtype=torch.float32, device=master.device)
        adamw(
            [master],
            [gradient],
            [states[0]],
            [states[1]],
            [],
            [before],
            fused=True,
            found_inf=overflow,
            amsgrad=False,
            beta1=config.betas[0],
            beta2=config.betas[1],
            lr=rate,
            weight_decay=config.weight_decay,
            eps=config.eps,
            maximize=False,
        )
