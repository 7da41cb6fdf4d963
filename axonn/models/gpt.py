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
from axonn.tensors import TensorSpec

INIT_STD = 0.02
LOSS_COST = 25
"""Work of the loss per logit, in FLOPs of a matrix product that take as long: it passes over float32 logits in memory.
A rough figure from timing single layers on a CPU: at hidden 256 it makes the head 5% dearer."""


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
    """First half of a transformer layer: x + attention(norm(x)), causal and multi-head; [batch, seq, hidden]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.hidden)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.projection = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, hidden = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, seq, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: torch.Tensor = self.projection(y.transpose(1, 2).reshape(batch, seq, hidden))
        return x + projected


class FeedForward(nn.Module):
    """Second half of a transformer layer: x + fc2(gelu(fc1(norm(x)))); [batch, seq, hidden]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden)
        self.fc1 = nn.Linear(config.hidden, 4 * config.hidden)
        self.fc2 = nn.Linear(4 * config.hidden, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fed: torch.Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return x + fed


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
    """A `PipelineModel`: embedding, two links of the chain for each of `layers` transformer layers, and the head.

    Cutting inside of a layer, between attention and feed-forward, lets stages come out nearly equal.
    """

    def __init__(self, config: GPTConfig) -> None:
        self.config = config
        c = config
        attention = c.seq_len * (8 * c.hidden**2 + 4 * c.seq_len * c.hidden)
        feed_forward = 16 * c.seq_len * c.hidden**2
        chain = [
            # The lookup reads and writes hidden values per token; its FLOPs are the addition of the positions.
            Layer(name="embedding", build=partial(Embedding, c), cost=c.seq_len * c.hidden)
        ]
        for i in range(c.layers):
            chain.append(Layer(name=f"attention{i}", build=partial(Attention, c), cost=attention, block=i))
            chain.append(Layer(name=f"mlp{i}", build=partial(FeedForward, c), cost=feed_forward, block=i))
        head = c.seq_len * c.vocab * (2 * c.hidden + LOSS_COST)
        chain.append(Layer(name="head", build=partial(Head, c), cost=head))
        self.layers: Sequence[Layer] = tuple(chain)
        self.ties: Sequence[tuple[str, str]] = (
            (("embedding.tokens.weight", "head.output.weight"),) if c.tied_head else ()
        )

    def initialise(self, name: str, parameter: torch.Tensor, *, seed: int) -> None:
        """Weights normal with deviation 0.02, residual projections scaled by 1/sqrt(2 layers) (GPT-2), norms one."""
        _, _, rest = name.partition(".")
        if rest.endswith("bias"):
            parameter.detach().zero_()
        elif "norm" in rest:
            parameter.detach().fill_(1.0)
        else:
            residual = rest in ("projection.weight", "fc2.weight")
            std = INIT_STD / math.sqrt(2 * self.config.layers) if residual else INIT_STD
            normal_(parameter, seed=seed, name=name, std=std)

    def activation(self, layer: int, microbatch_size: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        return (TensorSpec((microbatch_size, self.config.seq_len, self.config.hidden), dtype),)

    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = output.view(-1, output.shape[-1])
        # Sums over the vocabulary need more digits than half precision has.
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        return F.cross_entropy(logits, targets.reshape(-1))
