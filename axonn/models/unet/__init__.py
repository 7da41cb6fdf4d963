"""The diffusion U-Net: configuration, model, outline for the performance model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from axonn.config.model_config import ModelConfig
from axonn.models.registry import Architecture
from axonn.models.unet.unet_config import UNetConfig

if TYPE_CHECKING:
    from axonn.config.train_config import TrainConfig
    from axonn.data.images import ImageData
    from axonn.models.unet.unet_model import UNet
    from axonn.perf.layers.model_outline import ModelOutline


class UNetArchitecture(Architecture[UNetConfig]):
    """The architecture of kind "unet"."""

    config: ClassVar[type[ModelConfig]] = UNetConfig

    def model(self, config: UNetConfig) -> UNet:
        """Return the model, its layers not yet built."""
        from axonn.models.unet.unet_model import UNet

        return UNet(config)

    def outline(self, config: UNetConfig) -> ModelOutline:
        """Return the outline for the performance model."""
        from axonn.models.unet.unet_outline import unet_outline

        return unet_outline(config)

    def data(self, config: TrainConfig) -> ImageData:
        """Return the data of a training run."""
        from axonn.data.images import ImageData

        return ImageData.of(config)
