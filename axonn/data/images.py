"""Images to train a diffusion model on: the input is a noisy image, the target is the noise.

The image and the noise of sample g depend on the seed and g alone (`axonn.data.order`, `axonn.data.diffusion`). The
last images can be held out: training never reads them; evaluation reads only them, in order and each time with the same
noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from axonn.data.diffusion import Noising
from axonn.data.image_files import Pixels, read_images
from axonn.data.order import SampleOrder
from axonn.errors import DataError
from axonn.models.unet.unet_config import NoiseSchedule

Batch = tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]
_LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luminance (ITU-R BT.601)."""


class ImageData:
    """Noisy images of `channels` (1 or 3) x `image_size` x `image_size`, from `path` (see `read_images`).

    Each image is cropped to the largest square in its middle, and resized. `held_out`: the share of the images, rounded
    up and taken from the end, that is used for evaluation only. Raises `DataError` when there are no images.
    """

    def __init__(
        self,
        path: Path | str | None,
        *,
        image_size: int,
        channels: int,
        noise_steps: int,
        noise_schedule: NoiseSchedule = "linear",
        seed: int,
        held_out: float = 0.0,
    ) -> None:
        where = "scikit-learn's digits" if path is None else str(path)
        if channels not in (1, 3):
            raise DataError(f"{where}: images have 1 channel or 3, model.channels is {channels}")
        self.images = read_images(path)
        if not len(self.images):
            raise DataError(f"{where}: holds no images")
        self._size, self._channels = image_size, channels
        self._order = SampleOrder(len(self.images), seed=seed, held_out=held_out, where=where, what="images")
        self._noising = Noising(noise_schedule, noise_steps, seed=seed)
        self.trained_images = self._order.trained
        self.held_out_images = self._order.held_out

    @property
    def summary(self) -> str:
        """Number of images, as text."""
        return f"{len(self.images)} images"

    @property
    def digest(self) -> str:
        """Hash of the images, for the record of a run."""
        return self.images.digest()

    def image(self, item: int) -> torch.Tensor:
        """Return image `item` of the data, float32 [channels, image_size, image_size] from -1 to 1."""
        return fitted(self.images[item], size=self._size, channels=self._channels)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return inputs and targets of the global samples `numbers`.

        Inputs: noisy images [samples, channels, size, size] float32, and time steps [samples] int64. Targets: the
        noise, shaped like the images.
        """
        return self._batch(numbers, self._order.item, stream="training")

    def held_out_batch(self, numbers: Sequence[int]) -> Batch:
        """Return what `batch` does, for held-out samples."""
        return self._batch(numbers, self._order.held_out_item, stream="held out")

    def _batch(self, numbers: Sequence[int], item: Callable[[int], int], *, stream: str) -> Batch:
        images = torch.stack([self.image(item(number)) for number in numbers])
        noisy, steps, noise = self._noising(images, numbers, stream=stream)
        return (noisy, steps), noise


def fitted(pixels: Pixels, *, size: int, channels: int) -> torch.Tensor:
    """Crop and resize an image, uint8 [1 or 3, height, width], to float32 [channels, size, size] from -1 to 1."""
    image = torch.from_numpy(pixels.copy()).to(torch.float32) / 127.5 - 1
    if channels == 1 and len(image) == 3:
        image = (image * torch.tensor(_LUMINANCE).view(3, 1, 1)).sum(0, keepdim=True)
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[:, top : top + side, left : left + side]
    if side != size:
        image = F.interpolate(image[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    return image.expand(channels, -1, -1).contiguous()
