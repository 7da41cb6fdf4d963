"""The GPT of the papers: pre-norm transformer, learned positions, GELU, full-width feed-forward of 4 x hidden."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from axonn.config import GPTConfig
from axonn.models.base import Layer
from axonn.random import normal_

INIT_STD = 0.02


class Embedding(nn.Module):
    """Token plus learned position embedding: [batch, seq] int64 -> [batch, seq, hidden]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.hidden)
        self.positions = nn.Embedding(config.seq_len, config.hidden)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return embedded


class Attention(nn.Module):
    """Causal multi-head self-attention: [batch, seq, hidden] -> the same."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.projection = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, hidden = x.shape
        qkv = self.qkv(x).view(batch, seq, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: torch.Tensor = self.projection(y.transpose(1, 2).reshape(batch, seq, hidden))
        return projected


class Block(nn.Module):
    """One transformer layer: [batch, seq, hidden] -> the same."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden)
        self.fc1 = nn.Linear(config.hidden, 4 * config.hidden)
        self.fc2 = nn.Linear(4 * config.hidden, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x


class Head(nn.Module):
    """Final norm and language-model head: [batch, seq, hidden] -> [batch, seq, vocab]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden)
        self.output = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(self.norm(x))
        return logits


class GPT:
    """A `PipelineModel`: embedding, `layers` blocks and the head."""

    def __init__(self, config: GPTConfig) -> None:
        self.config = config
        c = config
        block = 24 * c.seq_len * c.hidden**2 * (1 + c.seq_len / (6 * c.hidden))
        self.layers: Sequence[Layer] = (
            # The lookup reads and writes hidden values per token; its FLOPs are the addition of the positions.
            Layer(name="embedding", build=partial(Embedding, c), cost=c.seq_len * c.hidden),
            *(Layer(name=f"block{i}", build=partial(Block, c), cost=block) for i in range(c.layers)),
            Layer(name="head", build=partial(Head, c), cost=2 * c.seq_len * c.hidden * c.vocab),
        )
        self.ties: Sequence[tuple[str, str]] = (
            (("embedding.tokens.weight", "head.output.weight"),) if c.tied_head else ()
        )

    def initialise(self, name: str, parameter: torch.Tensor, *, seed: int) -> None:
        """Weights normal with deviation 0.02, residual projections scaled by 1/sqrt(2 layers) (GPT-2), norms one."""
        layer, _, rest = name.partition(".")
        if rest.endswith("bias"):
            parameter.detach().zero_()
        elif "norm" in rest:
            parameter.detach().fill_(1.0)
        else:
            residual = layer.startswith("block") and rest in ("attention.projection.weight", "fc2.weight")
            std = INIT_STD / math.sqrt(2 * self.config.layers) if residual else INIT_STD
            normal_(parameter, seed=seed, name=name, std=std)

    def activation_shape(self, microbatch_size: int) -> tuple[int, ...]:
        return (microbatch_size, self.config.seq_len, self.config.hidden)

    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.view(-1, output.shape[-1]), targets.reshape(-1))
