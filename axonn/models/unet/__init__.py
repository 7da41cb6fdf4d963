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
        from axonn.data.order import held_out_of

        assert isinstance(config.model, UNetConfig)
        return ImageData(
            config.data.path,
            image_size=config.model.image_size,
            channels=config.model.channels,
            noise_steps=config.model.noise_steps,
            noise_schedule=config.model.noise_schedule,
            seed=config.seed,
            held_out=held_out_of(config),
        )
