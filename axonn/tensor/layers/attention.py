"""Multi-head attention with its heads cut along col: each rank computes some whole heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from axonn.tensor.context import TensorContext
from axonn.tensor.layers.dropout import Dropout
from axonn.tensor.layers.layer import NORMAL, TRANSPOSED
from axonn.tensor.layers.linear import Linear, linear
from axonn.tensor.layers.norm import wide_type


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dropout: Dropout | None = None,
    is_causal: bool = False,
    attn_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(head size)) v of [batch, heads, seq, head size]; `dropout` applies to the softmax.

    `attn_mask` [..., seq of q, seq of k], broadcast against batch and heads: added to the scores, or, if boolean, True
    for keys that take part (as in `F.scaled_dot_product_attention`). While dropout is active, the probabilities
    [batch, heads, seq of q, seq of k] are kept in memory, which the fused function avoids.
    """
    if is_causal and attn_mask is not None:
        attn_mask, is_causal = _also_causal(attn_mask, q.shape[-2], k.shape[-2]), False
    if dropout is None or not dropout.active:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))
    if is_causal:
        attn_mask = _causal(q.shape[-2], k.shape[-2], q.device)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    probabilities = torch.softmax(scores, -1, dtype=wide_type(scores.dtype)).to(q.dtype)
    y: torch.Tensor = dropout(probabilities) @ v
    return y


def _causal(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Return the causal mask, as in `F.scaled_dot_product_attention`: the first query sees only the first key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def _also_causal(mask: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    causal = _causal(queries, keys, mask.device)
    return mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -torch.inf)


class MultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` with batch_first and need_weights=False, its heads cut along col.

    [batch, seq, embed_dim / G_row] -> the same. `name`: name of its stream of random values, which no other layer may
    use. Raises `GridError` when the heads cannot be cut along col or `embed_dim` along row, `ValueError` when
    `num_heads` does not divide `embed_dim`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        context: TensorContext,
        name: str = "attention",
    ) -> None:
        super().__init__()
        label = f"num_heads of MultiheadAttention({embed_dim}, {num_heads})"
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"{label} must be a divisor of embed_dim")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.context = context
        self.heads = context.part(num_heads, "col", label)
        """Number of heads of this rank."""
        segments = [embed_dim] * 3
        self.in_proj = Linear(
            embed_dim, 3 * embed_dim, bias, device, dtype, context=context, layout=NORMAL, out_segments=segments
        )
        self.out_proj = Linear(embed_dim, embed_dim, bias, device, dtype, context=context, layout=TRANSPOSED)
        self.dropout = Dropout(dropout, name=name, context=context, cuts=((1, "col"),)) if dropout else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        *,
        is_causal: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the attention of `query` to `key` (default: `query`) with values `value` (default: `key`).

        `attn_mask` as in nn.MultiheadAttention: [seq of query, seq of key], or [batch x num_heads, ...] for all heads;
        added to the scores, or, if boolean, True for keys that take *no* part. `is_causal` adds the causal mask.
        """
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        y = attention(q, k, v, dropout=self.dropout, is_causal=is_causal, attn_mask=self._mask(attn_mask, q))
        out: torch.Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        return out

    def _projected(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project query, key and value, with a single product for those that are the same tensor."""
        if query is key is value:
            q, k, v = self.in_proj(query).chunk(3, -1)
        elif key is value:
            q = self._part(query, 0, 1)
            k, v = self._part(key, 1, 3).chunk(2, -1)
        else:
            q, k, v = self._part(query, 0, 1), self._part(key, 1, 2), self._part(value, 2, 3)
        return q, k, v

    def _part(self, x: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        """Return segments `first` to `stop` (exclusive) of the projection of `x`."""
        layer = self.in_proj
        size = layer.weight.shape[0] // 3
        rows = slice(first * size, stop * size)
        bias = None if layer.bias is None else layer.bias[rows]
        # Autograd accumulates the gradients of the slices.
        return linear(x, layer.weight[rows], bias, context=self.context, layout=layer.layout)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """Reshape [batch, seq, features] -> [batch, heads, seq, head size]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def _mask(self, mask: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
        if mask is None:
            return None
        if mask.dim() == 3:
            first = self.context.index("col") * self.heads
            mask = mask.view(-1, self.num_heads, *mask.shape[1:])[:, first : first + self.heads]
        return ~mask if mask.dtype == torch.bool else mask.to(q.dtype)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}"
