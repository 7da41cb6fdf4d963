"""The model as the engine sees it: a chain of layers, each built on the stage that owns it."""

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

    `build` makes the module, or a rank's shard of it, with uninitialised parameters. `cost` is the forward work of one
    sample in FLOPs, for the partitioner. `block` is the number of the block (a transformer layer) that the link belongs
    to: activation checkpointing counts blocks, and recomputes only layers that belong to one.
    """

    name: str
    build: Callable[[TensorContext], nn.Module]
    cost: float
    block: int | None = None


class PipelineModel(Protocol):
    """A model that inter-layer parallelism can cut between any two layers."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The chain, first to last. Each layer maps the outputs of the previous one to a tensor or a tuple of them."""
        ...

    @property
    def ties(self) -> Sequence[tuple[str, str]]:
        """Pairs of full parameter names ("layer.parameter") that share one parameter."""
        ...

    def check(self, grid: ProcessGrid) -> None:
        """Raise `GridError` when the tensor axes of `grid` cannot hold the layers, naming grids that can."""
        ...

    def initial(self, name: str) -> Initial:
        """Return the initialization of the parameter called `name` ("layer.parameter")."""
        ...

    def activation(
        self, layer: int, microbatch_size: int, dtype: torch.dtype, context: TensorContext
    ) -> tuple[TensorSpec, ...]:
        """Return the specs of the tensors that layer number `layer` passes to the next one on one rank, in `dtype`.

        The first dim of each is the microbatch's.
        """
        ...

    def loss(self, output: Any, targets: torch.Tensor, context: TensorContext) -> torch.Tensor:
        """Return the mean loss of a microbatch, equal on all ranks of row x col. `output`: of the last layer."""
        ...
