"""The GPT in plain torch modules, as a user of PyTorch writes it, with the initial weights of all frameworks."""

from __future__ import annotations

import torch
from torch import nn

from axonn.config.train_config import TrainConfig
from axonn.models.gpt.gpt_model import GPT
from baselines.adapters.adapter_common import Layers, gpt_of
from baselines.ranks import plain_gpt


def build(config: TrainConfig) -> nn.ModuleDict:
    """Build all layers, unsharded, by name."""
    model = gpt_of(config)
    gpt = GPT(model)
    source = Layers(gpt, range(len(gpt.layers)), config).chain
    dtype = getattr(torch, config.precision.compute)
    values = {f"{name}.{key}": value for name, layer in source.items() for key, value in layer.state_dict().items()}
    return nn.ModuleDict({name: plain_gpt.build(name, model, values, dtype) for name in plain_gpt.layer_names(model)})
