"""Training data: every sample is a function of the seed and its number alone."""

from __future__ import annotations

from typing import Protocol

import torch


class Dataset(Protocol):
    """The samples of a run, the same on every grid."""

    @property
    def summary(self) -> str:
        """Amount of data, as text for people."""
        ...

    @property
    def digest(self) -> str:
        """Hash of the data."""
        ...

    def batch(self, numbers: range) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor]:
        """Return inputs and targets of the global samples `numbers`, one per row."""
        ...

    def held_out_batch(self, numbers: range) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor]:
        """Return what `batch` does, for samples that are held out from training."""
        ...
