"""A language model of residual perceptrons: an architecture added from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from axonn.config.model_config import ModelConfig
from axonn.models.registry import Architecture
from tests.outside.residual_mlp.residual_mlp_config import ResidualMLPConfig

if TYPE_CHECKING:
    from axonn.config.train_config import TrainConfig
    from axonn.data.text import TextData
    from axonn.perf.layers.model_outline import ModelOutline
    from tests.outside.residual_mlp.residual_mlp_model import ResidualMLP


class ResidualMLPArchitecture(Architecture[ResidualMLPConfig]):
    """The architecture of kind "residual-mlp"."""

    config: ClassVar[type[ModelConfig]] = ResidualMLPConfig

    def model(self, config: ResidualMLPConfig) -> ResidualMLP:
        from tests.outside.residual_mlp.residual_mlp_model import ResidualMLP

        return ResidualMLP(config)

    def outline(self, config: ResidualMLPConfig) -> ModelOutline:
        from tests.outside.residual_mlp.residual_mlp_outline import residual_mlp_outline

        return residual_mlp_outline(config)

    def data(self, config: TrainConfig) -> TextData:
        from axonn.data.order import held_out_of
        from axonn.data.text import TextData

        assert isinstance(config.model, ResidualMLPConfig)
        return TextData(
            config.data.path,
            seq_len=config.model.seq_len,
            vocab=config.model.vocab,
            seed=config.seed,
            held_out=held_out_of(config),
        )
