"""Registry of architectures: one object each that makes its model, its outline for the performance model, and its data.

An architecture is a folder with its configuration, model and outline. It is registered under the `kind` of its
configuration by one line, an entry point of the group `axonn.architectures`. Nothing here imports torch: the planner
and the job scripts read configurations and outlines alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from axonn.config.model_config import ModelConfig, registered

if TYPE_CHECKING:
    from axonn.config.train_config import TrainConfig
    from axonn.data import Dataset
    from axonn.models.base import PipelineModel
    from axonn.perf.layers.model_outline import ModelOutline

C = TypeVar("C", bound=ModelConfig)


class Architecture(ABC, Generic[C]):
    """One architecture. Modules that need torch are imported only inside the methods that need them."""

    config: ClassVar[type[ModelConfig]]
    """Class of its configurations; the default of `kind` is the name under which the architecture is registered."""

    @abstractmethod
    def model(self, config: C) -> PipelineModel:
        """Return the model that `config` describes, its layers not yet built."""

    @abstractmethod
    def outline(self, config: C) -> ModelOutline:
        """Return the outline for the performance model: what each layer of the chain computes, keeps and sends."""

    @abstractmethod
    def data(self, config: TrainConfig) -> Dataset:
        """Return the data of a training run. Raises `DataError`."""


def architecture_of(config: ModelConfig) -> Architecture[ModelConfig]:
    """Return the architecture of a configuration."""
    architecture: Architecture[ModelConfig] = registered(config.kind)
    return architecture


def make_model(config: ModelConfig) -> PipelineModel:
    """Return the model that `config` describes."""
    return architecture_of(config).model(config)


def outline_of(config: ModelConfig) -> ModelOutline:
    """Return the outline of the model that `config` describes, for the performance model."""
    return architecture_of(config).outline(config)


def make_data(config: TrainConfig) -> Dataset:
    """Return the data of a training run, as its model needs it. Raises `DataError`."""
    return architecture_of(config.model).data(config)
