"""Noise for a diffusion model: its variance at each time step, and the noise of each sample.

Noise and time step of a sample are values of counter-based random streams: functions of the seed and its global number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod

import torch

from axonn.models.unet.unet_config import NoiseSchedule
from axonn.tensor.counter_random import normal, random_bits, stream_key

_LARGEST = 0.999
"""Upper bound on the share of the image's variance that one step replaces."""


def signal_variances(schedule: NoiseSchedule, steps: int) -> torch.Tensor:
    """Return the share of the image's variance that is left after each step, the rest being noise (alpha-bar).

    [steps] float64. linear: Ho, Jain & Abbeel, arXiv 2006.11239, where 1000 steps replace 1e-4 to 0.02 of the variance;
    with fewer steps each replaces proportionally more. cosine: Nichol & Dhariwal, arXiv 2102.09672.
    """
    if schedule == "linear":
        replaced = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    else:
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        left = torch.cos((times + 0.008) / 1.008 * (math.pi / 2)).square()
        replaced = 1 - left[1:] / left[:-1]
    return (1 - replaced.clamp(max=_LARGEST)).cumprod(0)


class Noising:
    """Adds noise to images. Samples of different streams get different noise."""

    def __init__(self, schedule: NoiseSchedule, steps: int, *, seed: int) -> None:
        self._signal = signal_variances(schedule, steps)
        self._seed = seed

    def __call__(
        self, images: torch.Tensor, numbers: Sequence[int], *, stream: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return noisy images, time steps [batch] int64, and the noise, for the global samples `numbers`.

        `images`: [batch, channels, height, width], with a variance of about 1. Images and noise returned have its type.
        """
        number = torch.tensor(list(numbers), dtype=torch.int64)
        steps = random_bits(stream_key(self._seed, f"{stream} timestep"), number) % len(self._signal)
        size = prod(images.shape[1:])
        index = number.unsqueeze(-1) * size + torch.arange(size)
        noise = normal(stream_key(self._seed, f"{stream} noise"), index).view(images.shape)
        signal = self._signal[steps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * images + (1 - signal).sqrt() * noise
        return noisy.to(images.dtype), steps, noise.to(images.dtype)
