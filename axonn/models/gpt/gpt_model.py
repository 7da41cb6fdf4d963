"""The GPT of the papers: pre-norm transformer, learned positions, GELU, full-width feed-forward of 4 x hidden."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from axonn import tensor
from axonn.distributed.tensor_spec import TensorSpec
from axonn.grid import ProcessGrid
from axonn.models.base import Layer
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.initialization import Constant, Initial, Normal
from axonn.tensor import TRANSPOSED, Dropout, Layout, Requirement, TensorContext, attention, check_fit, cross_entropy

INIT_STD = 0.02


def _residual_dropout(config: GPTConfig, context: TensorContext, layer: str) -> Dropout | None:
    """Return the dropout that `layer` applies to [batch, seq, hidden / G_row] before the residual stream, if any."""
    if not config.dropout:
        return None
    return Dropout(config.dropout, name=f"{layer}.dropout", context=context, cuts=((2, "row"),))


class GPTEmbedding(nn.Module):
    """Token plus learned position embedding: [batch, seq] int64 -> [batch, seq, hidden / G_row]."""

    def __init__(self, config: GPTConfig, context: TensorContext, *, name: str) -> None:
        super().__init__()
        self.tokens = tensor.Embedding(config.vocab, config.hidden, context=context)
        self.positions = tensor.Embedding(config.seq_len, config.hidden, context=context, layout=Layout(None, "row"))
        self.dropout = _residual_dropout(config, context, name)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return embedded if self.dropout is None else self.dropout(embedded)


class GPTAttention(nn.Module):
    """First half of a transformer layer: x + attention(norm(x)), causal and multi-head; [batch, seq, hidden / G_row].

    Each rank computes heads / G_col complete heads.
    """

    def __init__(self, config: GPTConfig, context: TensorContext, *, name: str) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads = context.part(config.heads, "col", "heads")
        self.norm = tensor.LayerNorm(hidden, context=context)
        self.qkv = tensor.Linear(hidden, 3 * hidden, context=context, out_segments=[hidden] * 3)
        self.projection = tensor.Linear(hidden, hidden, context=context, layout=TRANSPOSED)
        self.dropout = _residual_dropout(config, context, name)
        self.attention_dropout = (
            Dropout(config.attention_dropout, name=f"{name}.attention_dropout", context=context, cuts=((1, "col"),))
            if config.attention_dropout
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv: torch.Tensor = self.qkv(self.norm(x))
        q, k, v = qkv.view(*qkv.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = attention(q, k, v, dropout=self.attention_dropout, is_causal=True)
        projected: torch.Tensor = self.projection(y.transpose(1, 2).flatten(2))
        return x + (projected if self.dropout is None else self.dropout(projected))


class GPTFeedForward(nn.Module):
    """Second half of a transformer layer: x + fc2(gelu(fc1(norm(x)))); [batch, seq, hidden / G_row]."""

    def __init__(self, config: GPTConfig, context: TensorContext, *, name: str) -> None:
        super().__init__()
        self.norm = tensor.LayerNorm(config.hidden, context=context)
        self.fc1 = tensor.Linear(config.hidden, 4 * config.hidden, context=context)
        self.fc2 = tensor.Linear(4 * config.hidden, config.hidden, context=context, layout=TRANSPOSED)
        self.dropout = _residual_dropout(config, context, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fed: torch.Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return x + (fed if self.dropout is None else self.dropout(fed))


class GPTHead(nn.Module):
    """Final norm and language-model head: [batch, seq, hidden / G_row] -> [batch, seq, vocab / G_col]."""

    def __init__(self, config: GPTConfig, context: TensorContext) -> None:
        super().__init__()
        self.norm = tensor.LayerNorm(config.hidden, context=context)
        self.output = tensor.Linear(config.hidden, config.vocab, bias=False, context=context)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(self.norm(x))
        return logits


class GPT:
    """The GPT as a `PipelineModel`: embedding, two links of the chain per transformer layer, and the head.

    The chain can be cut inside a layer, between attention and feed-forward, which balances the stages better.
    """

    def __init__(self, config: GPTConfig) -> None:
        self.config = config
        c = config
        chain = [Layer(name="embedding", build=partial(GPTEmbedding, c, name="embedding"), cost=c.cost("embedding"))]
        for i in range(c.layers):
            halves = ("attention", GPTAttention, c.cost("attention")), ("mlp", GPTFeedForward, c.cost("mlp"))
            for kind, half, cost in halves:
                name = f"{kind}{i}"
                chain.append(Layer(name=name, build=partial(half, c, name=name), cost=cost, block=i))
        chain.append(Layer(name="head", build=partial(GPTHead, c), cost=c.cost("head")))
        self.layers: Sequence[Layer] = tuple(chain)
        self.ties: Sequence[tuple[str, str]] = (
            (("embedding.tokens.weight", "head.output.weight"),) if c.tied_head else ()
        )

    def check(self, grid: ProcessGrid) -> None:
        c = self.config
        check_fit(
            grid,
            Requirement("embedding and head", "vocab", c.vocab, "col"),
            Requirement("embedding, norms and attention", "hidden", c.hidden, "row"),
            Requirement("attention", "heads", c.heads, "col"),
        )

    def initial(self, name: str) -> Initial:
        """Return normal weights of deviation 0.02, over sqrt(2 layers) in residual projections (GPT-2); norms are 1."""
        _, _, rest = name.partition(".")
        if rest.endswith("bias"):
            return Constant(0.0)
        if "norm" in rest:
            return Constant(1.0)
        residual = rest in ("projection.weight", "fc2.weight")
        return Normal(INIT_STD / math.sqrt(2 * self.config.layers) if residual else INIT_STD)

    def activation(
        self, layer: int, microbatch_size: int, dtype: torch.dtype, context: TensorContext
    ) -> tuple[TensorSpec, ...]:
        hidden = context.part(self.config.hidden, "row", "hidden")
        return (TensorSpec((microbatch_size, self.config.seq_len, hidden), dtype),)

    def loss(self, output: torch.Tensor, targets: torch.Tensor, context: TensorContext) -> torch.Tensor:
        return cross_entropy(output.view(-1, output.shape[-1]), targets.reshape(-1), context=context)
