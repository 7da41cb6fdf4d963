"""The strongest peers: the same GPT in plain PyTorch modules, trained by a plain loop, as it is or through
torch.compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from axonn.config.train_config import TrainConfig
from axonn.models.gpt.gpt_model import GPT
from axonn.training.engine_framework import EngineTrainer
from baselines.adapters.adapter_common import Layers, adamw_settings, gpt_of, layers_of
from baselines.adapters.pytorch.pytorch_loop import PlainLoopTrainer
from baselines.ranks import plain_gpt
from baselines.ranks.mixed import HALF, MixedAdamW

MASTER = "master."


def weights_of(trainer: EngineTrainer) -> dict[str, torch.Tensor]:
    """Return the engine's master weights, "<layer>.<parameter>", without copying: one rank's are unsharded."""
    return {
        name.removeprefix(MASTER): part.tensor.reshape(part.shape)
        for name, part in trainer.state_tensors().items()
        if name.startswith(MASTER)
    }


def initial_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Return the same weights, made here in float32."""
    plain = config.model_copy(update={"precision": config.precision.model_copy(update={"compute": "float32"})})
    model = GPT(gpt_of(config))
    chunk = Layers(model, range(len(model.layers)), plain)
    return {f"{name}.{key}": value for name, m in layers_of([chunk]).items() for key, value in m.state_dict().items()}


def plain_module(
    config: TrainConfig, weights: Mapping[str, torch.Tensor], device: torch.device, *, dtype: torch.dtype
) -> nn.Sequential:
    """Return all layers with a copy of these weights."""
    with torch.device(device):
        layers = [plain_gpt.build(n, config.model, weights, dtype) for n in plain_gpt.layer_names(config.model)]
    return nn.Sequential(*layers)


def plain_loop(
    config: TrainConfig, weights: Mapping[str, torch.Tensor], device: torch.device, *, compiled: bool
) -> PlainLoopTrainer:
    """Return a loop in the engine's precision: half-precision parameters and gradients, float32 masters and moments,
    fused AdamW.

    Raises what `torch.compile` raises at its first batch.
    """
    dtype = getattr(torch, config.precision.compute)
    module: nn.Module = plain_module(config, weights, device, dtype=torch.float32)
    optimizer: Any = None
    if dtype in HALF:
        masters = [p.detach().clone() for p in module.parameters()]
        module = module.to(dtype)
        optimizer = MixedAdamW(module.parameters(), masters=masters, **adamw_settings(config))
    loss: Any = plain_gpt.loss_of
    if compiled:
        # Each kind of layer is compiled once, and all layers of the kind run that code; the head goes with the loss,
        # which is where the largest tensors are.
        for layer in list(module.children())[:-1]:
            layer.compile()
        module, loss = _headless(module)
    return PlainLoopTrainer(config, device=device, module=module, optimizer=optimizer, loss=loss)


def _headless(module: nn.Module) -> tuple[nn.Module, Any]:
    """Return all but the last layer, and a compiled loss that begins with it."""
    *body, head = module.children()

    def loss(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return plain_gpt.loss_of(head(x), targets)

    return nn.Sequential(*body), torch.compile(loss)
