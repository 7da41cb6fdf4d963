"""What the engine needs to know of a model: a chain of layers, each built on the stage that owns it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from axonn.tensors import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One link of the chain, not yet built.

    `build` makes the module (its parameters uninitialised); `cost` is the forward work of one sequence in FLOPs, for
    the partitioner. `block` is the number of the block (a transformer layer) that the link is part of: activation
    checkpointing counts blocks, and recomputes only what is part of one.
    """

    name: str
    build: Callable[[], nn.Module]
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

    def initialise(self, name: str, parameter: torch.Tensor, *, seed: int) -> None:
        """Fill the parameter called `name` ("layer.parameter"), as a function of name and seed alone."""
        ...

    def activation(self, layer: int, microbatch_size: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        """The tensors that layer number `layer` hands to the next one, computing in `dtype`."""
        ...

    def loss(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        """Mean loss of a microbatch, a scalar. `output` is what the last layer returned."""
        ...
