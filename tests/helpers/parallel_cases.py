"""Modules that the tests cut with `axonn.parallelize`, with their inputs; ties and names nobody calls included."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.plain_models import Attention, Awkward, Block, Classifier, Gated, LanguageModel, LeNet, UNet


def normal(*shape: int) -> torch.Tensor:
    """Random numbers in float64, the same ones every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(rows: int, length: int, below: int) -> torch.Tensor:
    """Random token indices [rows, length], the same ones every time."""
    return torch.randint(0, below, (rows, length), generator=torch.Generator().manual_seed(2))


class SharedEmbedding(nn.Module):
    """A T5's ties: `shared` and the decoder's embedding are names that the forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(48, 24)
        self.encoder = nn.ModuleDict({"embed_tokens": nn.Embedding(48, 24), "mlp": nn.Linear(24, 24)})
        self.decoder = nn.ModuleDict({"embed_tokens": nn.Embedding(48, 24), "mlp": nn.Linear(24, 24)})
        self.lm_head = nn.Linear(24, 48, bias=False)
        for tied in (self.encoder["embed_tokens"], self.decoder["embed_tokens"], self.lm_head):
            tied.weight = self.shared.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.encoder["mlp"](self.encoder["embed_tokens"](tokens))
        logits: torch.Tensor = self.lm_head(F.gelu(self.decoder["mlp"](x)))
        return logits


class OneModuleTwice(nn.Module):
    """A module under two names of its parent and in a list, of which the forward calls the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.again = self.first
        self.stack = nn.ModuleList([self.first, nn.GELU(), nn.Linear(24, 12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.stack:
            x = layer(x)
        return x


class Untouched(nn.Module):
    """A branch, parameters and buffers that nobody reads, some tied to what is cut; buffers that are not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.MultiheadAttention(24, 4))
        self.up = nn.Linear(12, 24)
        self.down = nn.Linear(24, 12)
        self.scale = nn.Parameter(torch.randn(24))
        self.alias = self.scale
        self.spare[0].weight = self.up.weight
        self.own = nn.ParameterList([self.down.bias, nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(()))])
        self.register_buffer("shift", torch.randn(24))
        self.register_buffer("other_shift", self.shift)
        self.register_buffer("unsaved", torch.randn(24), persistent=False)
        self.register_buffer("unread", torch.arange(5))
        self.register_buffer("unread_unsaved", torch.arange(5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x) * self.scale + self.shift + self.unsaved
        y: torch.Tensor = self.down(F.relu(h))
        return y


class Frozen(nn.Module):
    """A layer and a norm that are not trained, in front of some that are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.ReLU()).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(24, 24), nn.RMSNorm(24), nn.Linear(24, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.body(x))
        return y


class TiedByHand(nn.Module):
    """A square weight that a layer and a product by hand share."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 12)
        self.b = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) @ self.a.weight


class Case(NamedTuple):
    """A module and the arguments of its forward. `mixes_rows`: whether rows cannot be cut into sub-shards."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], list[torch.Tensor]]
    mixes_rows: bool = False


STYLES = ["separate", "split", "view", "interleaved", "einsum", "explicit", "batched", "multi-query"]

CASES: dict[str, Case] = {
    "lenet": Case(LeNet, lambda: [normal(4, 1, 16, 16)]),
    "unet": Case(UNet, lambda: [normal(3, 3, 4, 4), normal(3, 4)]),
    "language model": Case(lambda: LanguageModel(tied=False), lambda: [tokens(3, 5, 48)]),
    "tied language model": Case(lambda: LanguageModel(tied=True), lambda: [tokens(3, 5, 48)]),
    "classifier": Case(Classifier, lambda: [tokens(3, 5, 24)]),
    "gated": Case(Gated, lambda: [normal(3, 4, 12)]),
    "awkward": Case(Awkward, lambda: [normal(3, 12)], mixes_rows=True),
    "shared embedding": Case(SharedEmbedding, lambda: [tokens(3, 5, 48)]),
    "one module twice": Case(OneModuleTwice, lambda: [normal(3, 12)]),
    "untouched": Case(Untouched, lambda: [normal(3, 12)]),
    "frozen": Case(Frozen, lambda: [normal(3, 12)]),
    "tied by hand": Case(TiedByHand, lambda: [normal(3, 12)], mixes_rows=False),
    "odd heads": Case(lambda: Attention(24, 3, "separate"), lambda: [normal(3, 5, 24)]),
    **{f"{style} attention": Case(lambda s=style: Block(s), lambda: [normal(3, 5, 24)]) for style in STYLES},  # type: ignore[misc]
}


def make(name: str) -> nn.Module:
    """The module of a case, in float64 and with the same weights at every call."""
    torch.manual_seed(0)
    return CASES[name].make().double()
