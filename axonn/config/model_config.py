"""Configuration of a model of any registered architecture, which its `kind` names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar

from pydantic import SerializeAsAny, SerializerFunctionWrapHandler, WrapValidator, model_serializer
from pydantic_core import PydanticCustomError

from axonn.config.loading import Line, StrictModel, shortened, validate
from axonn.errors import ConfigError

ENTRY_POINTS = "axonn.architectures"
"""Group of the entry points that register architectures, each under the `kind` of its configuration."""
DEFAULT_KIND = "gpt"
"""Architecture of a model whose file has no `kind`."""


class ModelConfig(StrictModel, ABC):
    """Base of the configurations of all architectures."""

    kind: str
    name: Line

    sample_unit: ClassVar[str]
    """Unit in which throughput is counted: "tokens", "images"."""
    default_data: ClassVar[str]
    """Name of the data that is trained on where a configuration gives no `data.path`."""
    predicted_when_uneven: ClassVar[bool] = False
    """True where the performance model also takes grids that do not divide the layers, as if they were cut evenly."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Number of trainable parameters; a tied one counts once."""

    @property
    @abstractmethod
    def units_per_sample(self) -> int:
        """Number of `sample_unit`s of one sample."""

    @property
    def token_vocab(self) -> int | None:
        """Vocabulary size of the tokens that it trains on; None where it trains on something else."""
        return None

    @abstractmethod
    def training_flops(self, *, recompute: bool) -> float:
        """Return the floating-point operations of training on one sample, with or without activation recompute."""

    @abstractmethod
    def flops_formula(self, *, recompute: bool) -> str:
        """Return the formula of `training_flops`, for records and tables."""

    @abstractmethod
    def workload(self) -> dict[str, int]:
        """Return the sizes by which records describe the model: fields of `axonn.observability.records.Workload`."""

    @model_serializer(mode="wrap")
    def _with_kind(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Also where defaults are left out: it says what the other keys mean.
        content: dict[str, Any] = serialized(self)
        return content if self.kind == DEFAULT_KIND else {"kind": self.kind, **content}

    @classmethod
    def alternatives(cls) -> list[type[StrictModel]]:
        """Return the configurations of all registered architectures."""
        return [registered(kind).config for kind in architecture_kinds()] if cls is ModelConfig else [cls]

    @classmethod
    def is_kind_of(cls, data: Any) -> bool:
        """Return whether `kind` is that of this architecture."""
        kind: object = cls.model_fields["kind"].default
        return isinstance(data, dict) and data.get("kind", DEFAULT_KIND) == kind

    def check_tensor_axes(self, *, row: int, col: int) -> None:
        """Raise `ConfigError` when the performance model cannot cut the layers this way; by default it can."""


def architecture_kinds() -> list[str]:
    """Return the kinds of all registered architectures, sorted."""
    return sorted({entry.name for entry in entry_points(group=ENTRY_POINTS)})


@cache
def registered(kind: str) -> Any:
    """Return the registered architecture of this kind (`axonn.models.registry.Architecture`). Raises `KeyError`."""
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == kind:
            return entry.load()()
    raise KeyError(kind)


def config_class(content: Any) -> type[ModelConfig]:
    """Return the class of the configuration whose plain keys are `content`. Raises `KeyError` for an unknown kind."""
    kind = content.get("kind", DEFAULT_KIND) if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise KeyError(kind)
    config: type[ModelConfig] = registered(kind).config
    return config


def validate_model(content: Any, *, where: str) -> ModelConfig:
    """Return the model whose keys are `content`. Raises `ConfigError` naming `where`, the key and the nearest key."""
    try:
        kind = config_class(content) if isinstance(content, dict) else ModelConfig
    except KeyError:
        raise ConfigError(f"{where}: 'kind': {_expected()} (found {shortened(content['kind'])})") from None
    return validate(content, kind, where=where)


def _expected() -> str:
    known = " or ".join(f"'{name}'{' (the default)' * (name == DEFAULT_KIND)}" for name in architecture_kinds())
    return f"expected the keys of a model, kind being {known}"


def _validated(value: Any, handler: Any) -> ModelConfig:
    if isinstance(value, ModelConfig):
        return value
    try:
        kind = config_class(value)
    except KeyError:
        raise PydanticCustomError("kind", _expected()) from None
    return kind.model_validate(value)


AnyModel = Annotated[SerializeAsAny[ModelConfig], WrapValidator(_validated)]
"""A model of any registered architecture, by its `kind`."""
