"""What models train on."""

from __future__ import annotations

from typing import Protocol

import torch

from axonn.config import GPTConfig, TrainConfig
from axonn.data.images import ImageData
from axonn.data.text import TextData

__all__ = ["Data", "ImageData", "TextData", "make_data"]


class Data(Protocol):
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


def make_data(config: TrainConfig) -> Data:
    """The data of a training run: text for a GPT, images for a U-Net. Raises `DataError`."""
    return TextData.of(config) if isinstance(config.model, GPTConfig) else ImageData.of(config)
