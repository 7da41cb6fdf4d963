"""What the engine needs to know of a model: a chain of layers, each built on the stage that owns it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from axonn.distributed.tensor_spec import TensorSpec
from axonn.grid import ProcessGrid
from axonn.models.initialization import Initial
from axonn.tensor.context import TensorContext


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One link of the chain, not yet built.

    `build` makes the module, or a rank's part of it (its parameters uninitialised); `cost` is the forward work of one
    sequence in FLOPs, for the partitioner. `block` is the number of the block (a transformer layer) that the link is
    part of: activation checkpointing counts blocks, and recomputes only what is part of one.
    """

    name: str
    build: Callable[[TensorContext], nn.Module]
    cost: float
    block: int | None = None


class PipelineModel(Protocol):
    """A model that inter-layer parallelism can cut between any two layers."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The chain, first to last. Each layer maps the tensors of the one before to a tensor or a tuple of them."""
        ...

    @property
    def ties(self) -> Sequence[tuple[str, str]]:
        """Pairs of full parameter names ("layer.parameter") that are one parameter."""
        ...

    def check(self, grid: ProcessGrid) -> None:
        """Raise `GridError` when the tensor axes of `grid` cannot hold the layers, naming grids that can."""
        ...

    def initial(self, name: str) -> Initial:
        """What the parameter called `name` ("layer.parameter") begins with."""
        ...

    def activation(
        self, layer: int, microbatch_size: int, dtype: torch.dtype, context: TensorContext
    ) -> tuple[TensorSpec, ...]:
        """The tensors that layer number `layer` hands to the next one on one rank, computing in `dtype`.

        The first dim of each is that of the rows of the microbatch.
        """
        ...

    def loss(self, output: Any, targets: torch.Tensor, context: TensorContext) -> torch.Tensor:
        """Mean loss of a microbatch, a scalar, the same on all ranks of row x col. `output`: of the last layer."""
        ...
