"""Data that models train on: samples that are a function of the seed and their number alone."""

from __future__ import annotations

from typing import Protocol

import torch


class Dataset(Protocol):
    """The samples of a run, the same on every grid."""

    @property
    def summary(self) -> str:
        """How much there is, for people."""
        ...

    @property
    def digest(self) -> str:
        """Hash of all of it."""
        ...

    def batch(self, numbers: range) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor]:
        """Inputs and targets of the global samples `numbers`, one a row."""
        ...

    def held_out_batch(self, numbers: range) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor]:
        """As `batch`, of samples that are kept from training."""
        ...
