"""The configuration of a residual perceptron."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from axonn.config.model_config import ModelConfig


class ResidualMLPConfig(ModelConfig):
    """A chain of `blocks` perceptrons of `hidden` x `inner`, each added to its input, token by token."""

    kind: Literal["residual-mlp"] = "residual-mlp"
    blocks: int = Field(ge=1)
    hidden: int = Field(ge=1)
    inner: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    vocab: int = Field(ge=2)

    sample_unit: ClassVar[str] = "tokens"
    default_data: ClassVar[str] = "the sources of Python's standard library"

    @property
    def parameters(self) -> int:
        block = 2 * self.hidden * self.inner + self.inner + self.hidden
        return self.blocks * block + 2 * self.vocab * self.hidden

    @property
    def units_per_sample(self) -> int:
        return self.seq_len

    @property
    def token_vocab(self) -> int:
        return self.vocab

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the matrix products of one sequence."""
        return 2 * self.seq_len * self.hidden * (2 * self.blocks * self.inner + self.vocab)

    def training_flops(self, *, recompute: bool) -> float:
        return (4 if recompute else 3) * self.forward_flops

    def flops_formula(self, *, recompute: bool) -> str:
        return f"{4 if recompute else 3} x forward of matrix products"

    def workload(self) -> dict[str, int]:
        return {"forward_flops": self.forward_flops}
