"""The models of the suite: chains of links that any grid can hold."""

from axonn.config import GPTConfig, ModelConfig
from axonn.models.base import Layer, PipelineModel
from axonn.models.gpt import GPT
from axonn.models.unet import UNet

__all__ = ["GPT", "Layer", "PipelineModel", "UNet", "make_model"]


def make_model(config: ModelConfig) -> PipelineModel:
    """The model that `config` describes."""
    return GPT(config) if isinstance(config, GPTConfig) else UNet(config)
