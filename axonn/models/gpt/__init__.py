"""The GPT of the papers: configuration, model, outline for the performance model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from axonn.config.model_config import ModelConfig
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import Architecture

if TYPE_CHECKING:
    from axonn.config.train_config import TrainConfig
    from axonn.data.text import TextData
    from axonn.models.gpt.gpt_model import GPT
    from axonn.perf.layers.model_outline import ModelOutline


class GPTArchitecture(Architecture[GPTConfig]):
    """The architecture of kind "gpt"."""

    config: ClassVar[type[ModelConfig]] = GPTConfig

    def model(self, config: GPTConfig) -> GPT:
        """Return the model, its layers not yet built."""
        from axonn.models.gpt.gpt_model import GPT

        return GPT(config)

    def outline(self, config: GPTConfig) -> ModelOutline:
        """Return the outline for the performance model."""
        from axonn.models.gpt.gpt_outline import gpt_outline

        return gpt_outline(config)

    def data(self, config: TrainConfig) -> TextData:
        """Return the data of a training run."""
        from axonn.data.order import held_out_of
        from axonn.data.text import TextData

        assert isinstance(config.model, GPTConfig)
        return TextData(
            config.data.path,
            seq_len=config.model.seq_len,
            vocab=config.model.vocab,
            seed=config.seed,
            held_out=held_out_of(config),
        )
