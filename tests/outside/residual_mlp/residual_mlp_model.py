"""The model: embedding, perceptrons, head, cut along row and col as their layers are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from axonn import tensor
from axonn.distributed.tensor_spec import TensorSpec
from axonn.grid import ProcessGrid
from axonn.models.base import Layer
from axonn.models.initialization import Constant, Initial, Normal
from axonn.tensor import TRANSPOSED, Requirement, TensorContext, check_fit, cross_entropy
from tests.outside.residual_mlp.residual_mlp_config import ResidualMLPConfig


class Perceptron(nn.Module):
    """x + fc2(silu(fc1(x))); [batch, seq, hidden / G_row]."""

    def __init__(self, config: ResidualMLPConfig, context: TensorContext) -> None:
        super().__init__()
        self.fc1 = tensor.Linear(config.hidden, config.inner, context=context)
        self.fc2 = tensor.Linear(config.inner, config.hidden, context=context, layout=TRANSPOSED)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(F.silu(self.fc1(x)))


class ResidualMLP:
    """A `PipelineModel`: embedding, one link for each perceptron, head."""

    ties: Sequence[tuple[str, str]] = ()

    def __init__(self, config: ResidualMLPConfig) -> None:
        self.config = c = config
        embedding = partial(lambda context: tensor.Embedding(c.vocab, c.hidden, context=context))
        head = partial(lambda context: tensor.Linear(c.hidden, c.vocab, bias=False, context=context))
        work = 4.0 * c.seq_len * c.hidden * c.inner
        self.layers: Sequence[Layer] = (
            Layer(name="embedding", build=embedding, cost=float(c.seq_len * c.hidden)),
            *(Layer(name=f"mlp{i}", build=partial(Perceptron, c), cost=work, block=i) for i in range(c.blocks)),
            Layer(name="head", build=head, cost=2.0 * c.seq_len * c.hidden * c.vocab),
        )

    def check(self, grid: ProcessGrid) -> None:
        c = self.config
        check_fit(
            grid,
            Requirement("embedding and head", "vocab", c.vocab, "col"),
            Requirement("perceptrons", "hidden", c.hidden, "row"),
            Requirement("perceptrons", "inner", c.inner, "col"),
        )

    def initial(self, name: str) -> Initial:
        return Constant(0.0) if name.endswith("bias") else Normal(0.2)

    def activation(
        self, layer: int, microbatch_size: int, dtype: torch.dtype, context: TensorContext
    ) -> tuple[TensorSpec, ...]:
        hidden = context.part(self.config.hidden, "row", "hidden")
        return (TensorSpec((microbatch_size, self.config.seq_len, hidden), dtype),)

    def loss(self, output: torch.Tensor, targets: torch.Tensor, context: TensorContext) -> torch.Tensor:
        return cross_entropy(output.view(-1, output.shape[-1]), targets.reshape(-1), context=context)
