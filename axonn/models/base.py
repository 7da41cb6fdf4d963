"""What the engine needs to know of a model: a chain of layers, each built on the stage that owns it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One link of the chain, not yet built.

    `build` makes the module (its parameters uninitialised); `cost` is the forward work of one sequence in FLOPs, for
    the partitioner.
    """

    name: str
    build: Callable[[], nn.Module]
    cost: float


class PipelineModel(Protocol):
    """A model that inter-layer parallelism can cut between any two layers."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The chain, first to last. Each layer maps one tensor to one tensor."""
        ...

    @property
    def ties(self) -> Sequence[tuple[str, str]]:
        """Pairs of full parameter names ("layer.parameter") that are one parameter."""
        ...

    def initialise(self, name: str, parameter: torch.Tensor, *, seed: int) -> None:
        """Fill the parameter called `name` ("layer.parameter"), as a function of name and seed alone."""
        ...

    def activation_shape(self, microbatch_size: int) -> tuple[int, ...]:
        """Shape of the tensor between two layers."""
        ...

    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean loss of a microbatch, a scalar."""
        ...
