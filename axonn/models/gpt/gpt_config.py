"""The configuration of a GPT."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from axonn.config.model_config import ModelConfig
from axonn.errors import ConfigError
from axonn.observability.records import gpt_flops

LOSS_COST = 25
"""Cost of the loss per logit, in FLOPs of a matrix product that takes as long: it passes over float32 logits in memory.
A rough figure from timing single layers on a CPU; at hidden 256 it adds 5% to the cost of the head."""


class GPTConfig(ModelConfig):
    """A GPT as the papers train it. `vocab` and `seq_len` in tokens; `hidden` must be a multiple of `heads`.

    `dropout`: probability after the embedding and before each addition to the residual stream; `attention_dropout`:
    probability for the attention weights.
    """

    kind: Literal["gpt"] = "gpt"
    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    vocab: int = Field(ge=2)
    tied_head: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)

    sample_unit: ClassVar[str] = "tokens"
    default_data: ClassVar[str] = "the sources of Python's standard library"

    def model_post_init(self, context: Any) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")

    @property
    def parameters(self) -> int:
        """Number of trainable parameters (a tied head counts once)."""
        h = self.hidden
        block = 12 * h * h + 13 * h
        embedding = (self.vocab + self.seq_len) * h
        head = 2 * h + (0 if self.tied_head else self.vocab * h)
        return self.layers * block + embedding + head

    def cost(self, link: Literal["embedding", "attention", "mlp", "head"]) -> float:
        """Return the forward work of one sequence in a link of the chain, in FLOPs, for the partitioner."""
        s, h = self.seq_len, self.hidden
        match link:
            case "embedding":
                # The lookup reads and writes hidden values per token; its FLOPs are the addition of the positions.
                return s * h
            case "attention":
                return s * (8 * h**2 + 4 * s * h)
            case "mlp":
                return 16 * s * h**2
            case "head":
                return s * self.vocab * (2 * h + LOSS_COST)

    @property
    def units_per_sample(self) -> int:
        """Tokens of a sequence."""
        return self.seq_len

    @property
    def token_vocab(self) -> int:
        """Number of different tokens."""
        return self.vocab

    def training_flops(self, *, recompute: bool) -> float:
        """Return the FLOPs of training on one sequence (`axonn.observability.records.gpt_flops`)."""
        return gpt_flops(batch=1, **self.workload(), recompute=recompute)

    def flops_formula(self, *, recompute: bool) -> str:
        """Return the formula of `training_flops` as text, for records and tables."""
        return f"{96 if recompute else 72}bslh^2(1+s/6h)+6bshV ({'activation' if recompute else 'no'} recompute)"

    def workload(self) -> dict[str, int]:
        """Return the sizes by which records describe the workload."""
        return {"seq_len": self.seq_len, "layers": self.layers, "hidden": self.hidden, "vocab": self.vocab}

    def check_tensor_axes(self, *, row: int, col: int) -> None:
        """Raise `ConfigError` unless the tensor axes divide heads and hidden."""
        for axis, extent, quantity, size in (
            ("col", col, "heads", self.heads),
            ("col", col, "hidden", self.hidden),
            ("row", row, "hidden", self.hidden),
        ):
            if size % extent:
                raise ConfigError(
                    f"{quantity} ({size}) of {self.name} is no multiple of {axis} = {extent}; change {axis}"
                )
