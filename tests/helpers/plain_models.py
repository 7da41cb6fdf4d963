"""Ordinary modules of plain PyTorch, that know nothing of grids."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class LeNet(nn.Module):
    """Convolutions, then fully connected layers; defined in another order than they are used in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc3 = nn.Linear(24, 10)
        self.fc1 = nn.Linear(12 * 4, 36)
        self.conv2 = nn.Conv2d(12, 12, 5)
        self.fc2 = nn.Linear(36, 24)
        self.conv1 = nn.Conv2d(1, 12, 5, padding=2)
        self.pool = nn.MaxPool2d(2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.act(self.conv1(x)))
        x = self.pool(self.act(self.conv2(x)))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        y: torch.Tensor = self.fc3(F.relu_(self.fc2(x)))
        return y


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(4, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(4, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        y: torch.Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return y


class UNet(nn.Module):
    """Group norms, a time embedding, 1x1 skips, and concatenations with what was computed on the way down."""

    def __init__(self, width: int = 12, time: int = 12) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(4, time), nn.SiLU(), nn.Linear(time, time))
        self.input = nn.Conv2d(3, width, 3, padding=1)
        self.down1 = ResBlock(width, width, time)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.down2 = ResBlock(2 * width, 2 * width, time)
        self.up2 = ResBlock(4 * width, 2 * width, time)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.up1 = ResBlock(2 * width, width, time)
        self.norm = nn.GroupNorm(4, width)
        self.output = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        time = self.time(time)
        a = self.down1(self.input(x), time)
        b = self.down(a)
        u = self.up2(torch.cat([self.down2(b, time), b], 1), time)
        u = self.up(F.interpolate(u, scale_factor=2.0, mode="nearest"))
        u = self.up1(torch.cat([u, a], dim=1), time)
        y: torch.Tensor = self.output(F.silu(self.norm(u)))
        return y


class Attention(nn.Module):
    """Causal self-attention, written in one of the usual `style`s."""

    def __init__(self, features: int, heads: int, style: str) -> None:
        super().__init__()
        self.heads = heads
        self.style = style
        if style in ("separate", "explicit", "batched"):
            self.q = nn.Linear(features, features)
            self.k = nn.Linear(features, features)
            self.v = nn.Linear(features, features)
        elif style == "multi-query":
            self.q = nn.Linear(features, features)
            self.kv = nn.Linear(features, 2 * features // heads)
        else:
            self.qkv = nn.Linear(features, 3 * features)
        self.projection = nn.Linear(features, features)
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16), persistent=False)

    def qkv_of(self, x: torch.Tensor) -> Any:
        rows, length, features = x.size()
        shape = rows, length, self.heads, features // self.heads
        if self.style == "view":
            return self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.style == "interleaved":
            return self.qkv(x).view(rows, length, self.heads, -1).transpose(1, 2).chunk(3, dim=-1)
        if self.style == "einsum":
            q, k, v = self.qkv(x).chunk(3, -1)
            return tuple(torch.einsum("bthd->bhtd", t.unflatten(-1, (self.heads, -1))) for t in (q, k, v))
        if self.style == "multi-query":
            k, v = self.kv(x).chunk(2, -1)
            return self.q(x).view(shape).transpose(1, 2), k.unsqueeze(1), v.unsqueeze(1)
        q, k, v = self.qkv(x).split(features, dim=2) if self.style == "split" else (self.q(x), self.k(x), self.v(x))
        return tuple(t.reshape(shape).transpose(1, 2) for t in (q, k, v))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, features = x.shape
        assert length <= 16, "the mask is too small"
        q, k, v = self.qkv_of(x)
        if self.style in ("explicit", "multi-query"):
            scores = q @ k.transpose(-2, -1) / k.size(-1) ** 0.5
            scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
            y = F.softmax(scores, dim=-1) @ v
        elif self.style == "batched":
            q, k, v = (t.reshape(rows * self.heads, length, -1) for t in (q, k, v))
            y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(rows, self.heads, length, -1)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: torch.Tensor = self.projection(y.transpose(1, 2).contiguous().view(rows, length, features))
        return projected


class Block(nn.Module):
    def __init__(self, style: str, features: int = 24, heads: int = 12, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features)
        self.attention = Attention(features, heads, style)
        self.norm2 = nn.LayerNorm(features)
        self.mlp = nn.Sequential(nn.Linear(features, 48), nn.GELU(), nn.Linear(48, features))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        y: torch.Tensor = self.dropout(self.mlp(self.norm2(x)))
        y += x
        return y


class LanguageModel(nn.Module):
    def __init__(self, *, tied: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.head = nn.Linear(24, 48, bias=False)
        self.tokens = nn.Embedding(48, 24, padding_idx=3)
        self.positions = nn.Embedding(16, 24)
        self.norm = nn.LayerNorm(24)
        self.blocks = nn.ModuleList([Block("split", dropout=dropout), Block("separate", dropout=dropout)])
        self.unused = nn.Linear(3, 3)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class Classifier(nn.Module):
    """An embedding, a mean over positions, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(12, 5)
        self.embedding = nn.Embedding(24, 12)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.output(self.embedding(tokens).mean(1))
        return y


class Gated(nn.Module):
    """RMS norms, a gate made by halving features, GLU, parameters used directly, and a token put before the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, 12))
        self.places = nn.Parameter(torch.randn(1, 9, 12))
        self.scale = nn.Parameter(torch.randn(()))
        self.norm = nn.RMSNorm(12)
        self.up = nn.Linear(12, 48)
        self.down = nn.Linear(24, 12, bias=False)
        self.gate = nn.Linear(12, 24)
        self.back = nn.Linear(12, 12)
        self.output = nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1) + self.places[:, : x.shape[1] + 1]
        h = self.up(self.norm(x))
        x = x + self.down(F.silu(h[..., :24]) * h[..., 24:]) * self.scale
        x = x + self.back(F.glu(self.gate(x), dim=-1))
        both = torch.stack([x, x.flip(1)], dim=2)
        y: torch.Tensor = self.output(torch.cat([both.sum(2), both.amax(2)], -1))[:, 0]
        return y


class Awkward(nn.Module):
    """Much that cannot be cut, and a module that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(12, 12)
        self.other = nn.Linear(12, 12)
        self.batch_norm = nn.BatchNorm1d(12)
        self.odd = nn.Linear(12, 7)
        self.grouped = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.transposed = nn.ConvTranspose2d(12, 12, 2, stride=2)
        self.point = nn.Conv2d(12, 12, 1)
        self.recurrent = nn.LSTM(12, 12, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        y = self.twice(self.twice(F.relu(x))) + self.other(x)
        y = self.batch_norm(y)
        image = self.point(y[:, :, None, None].expand(-1, -1, 2, 2))
        z = self.transposed(self.grouped(image)).mean((2, 3))
        sequence, _ = self.recurrent(torch.stack([y, z], 1))
        z = F.pixel_shuffle(self.point(image), 2).mean((2, 3)).repeat(1, 4) + sequence[:, -1]
        return self.odd(z + self.twice(y)), {"z": z}
