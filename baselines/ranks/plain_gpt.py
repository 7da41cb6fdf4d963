"""The GPT of `axonn.models.gpt.gpt_model` in plain torch modules: same layers, same parameters, same function.

The rows of `qkv` are ordered by head, so that a shard of them is complete heads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class PlainEmbedding(nn.Module):
    """Token and position embedding: [batch, seq] int64 -> [batch, seq, hidden]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(model.vocab, model.hidden)
        self.positions = nn.Embedding(model.seq_len, model.hidden)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return embedded


class PlainAttention(nn.Module):
    """First half of a transformer layer, with as many heads as `qkv` has."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.width = model.hidden // model.heads
        self.norm = nn.LayerNorm(model.hidden)
        self.qkv = nn.Linear(model.hidden, 3 * model.hidden)
        self.projection = nn.Linear(model.hidden, model.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv: torch.Tensor = self.qkv(self.norm(x))
        q, k, v = qkv.view(*qkv.shape[:2], -1, 3, self.width).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: torch.Tensor = self.projection(y.transpose(1, 2).flatten(2))
        return x + projected


class PlainFeedForward(nn.Module):
    """Second half of a transformer layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(model.hidden)
        self.fc1 = nn.Linear(model.hidden, 4 * model.hidden)
        self.fc2 = nn.Linear(4 * model.hidden, model.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fed: torch.Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return x + fed


class PlainHead(nn.Module):
    """Norm and output layer: [batch, seq, hidden] -> [batch, seq, vocab]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(model.hidden)
        self.output = nn.Linear(model.hidden, model.vocab, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(self.norm(x))
        return logits


def layer_names(model: Any) -> list[str]:
    """Return the names of the layers in their order."""
    halves = [f"{kind}{i}" for i in range(model.layers) for kind in ("attention", "mlp")]
    return ["embedding", *halves, "head"]


def stages(model: Any) -> list[list[str]]:
    """Return the names of the layers of each stage; the variable STAGE_STARTS has the first ones."""
    names = layer_names(model)
    starts = [int(start) for start in os.environ["STAGE_STARTS"].split(",")]
    return [names[first:end] for first, end in zip(starts, [*starts[1:], len(names)], strict=True)]


def build(name: str, model: Any, weights: Mapping[str, torch.Tensor] | None, dtype: torch.dtype) -> nn.Module:
    """Build the layer `name` of `model` (anything with the attributes of a GPTConfig), with its weights, or torch's
    own."""
    kinds: dict[str, type[nn.Module]] = {
        "embedding": PlainEmbedding,
        "attention": PlainAttention,
        "mlp": PlainFeedForward,
        "head": PlainHead,
    }
    layer = kinds[name.rstrip("0123456789")](model).to(dtype)
    if weights is None:
        return layer
    state = {key.partition(".")[2]: value for key, value in weights.items() if key.partition(".")[0] == name}
    for key in ("qkv.weight", "qkv.bias"):
        if key in state:
            state[key] = by_head(state[key], model.heads)
    layer.load_state_dict(state)
    return layer


def by_head(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of all queries, keys and values, reordered by head."""
    return torch.unflatten(values, 0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def microbatches(inputs: torch.Tensor, targets: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return the inputs and targets of each microbatch of `size` rows."""
    return zip(torch.split(inputs, size), torch.split(targets, size), strict=True)


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy per token, in float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten())
