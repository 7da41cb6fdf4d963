"""The configuration of an optimizer, whatever its algorithm; `name` names one of the registered algorithms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, SerializerFunctionWrapHandler, WrapValidator, model_serializer
from pydantic_core import PydanticCustomError

from axonn.config.loading import StrictModel

DEFAULT_ALGORITHM = "adamw"
"""Algorithm of an optimizer whose file has no `name`."""


class LearningRateConfig(StrictModel):
    """Learning-rate schedule: up to `optimizer.lr` over `warmup` batches, then on as `name` says.

    linear and cosine decay to `final` x lr at batch number `decay_until` (default: the end of the run) and stay there.
    """

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(default=0, ge=0)
    decay_until: int | None = Field(default=None, ge=1)
    final: float = Field(default=0.1, ge=0, le=1)


OptimizerPlacement = Literal["device", "offloaded"]


class OptimizerConfig(StrictModel):
    """Base of the configurations of all algorithms, with the keys that all have.

    With placement "offloaded" (the memory optimisation) master weights and state lie in host memory, and the step
    streams them through `buckets_resident` buckets of `bsize` elements on the device. Gradients are all-reduced in
    chunks of `k` buckets, and the optimizer runs on one chunk while the next is reduced; `k: null` makes all buckets
    one chunk. `clip_norm` is the largest allowed norm of the gradient of the whole model.
    """

    name: str
    lr: float = Field(default=1e-3, gt=0)
    clip_norm: float | None = Field(default=None, gt=0)
    schedule: LearningRateConfig = LearningRateConfig()
    placement: OptimizerPlacement = "device"
    bsize: int = Field(default=4_000_000, ge=1)
    k: int | None = Field(default=4, ge=1)
    buckets_resident: int = Field(default=2, ge=1)

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump the algorithm's own keys before those that all have. The name stands there whatever is excluded, since
        the keys mean nothing without it, but for that of the default, which needs none."""
        plain: dict[str, Any] = handler(self)
        plain.pop("name", None)
        shared = OptimizerConfig.model_fields.keys() - {"lr"}
        named = {} if self.name == DEFAULT_ALGORITHM else {"name": self.name}
        return named | dict(sorted(plain.items(), key=lambda item: item[0] in shared))

    @classmethod
    def alternatives(cls) -> list[type[StrictModel]]:
        """Return the configurations of all registered algorithms."""
        from axonn.optim.algorithms.registry import ALGORITHMS

        return [algorithm.config for algorithm in ALGORITHMS.values()] if cls is OptimizerConfig else [cls]

    @classmethod
    def is_kind_of(cls, data: Any) -> bool:
        """Return whether `name` is that of this algorithm."""
        return isinstance(data, dict) and data.get("name", DEFAULT_ALGORITHM) == cls.algorithm_name()

    @classmethod
    def called(cls) -> str:
        """Return the words for it in a message."""
        return f"the optimizer '{cls.algorithm_name()}'"

    @classmethod
    def algorithm_name(cls) -> str:
        """Return the name of the algorithm that this configures: the default of `name`."""
        return str(cls.model_fields["name"].default)


def _validated(value: Any, handler: Any) -> OptimizerConfig:
    from axonn.optim.algorithms.registry import ALGORITHMS

    if isinstance(value, OptimizerConfig):
        return value
    name = value.get("name", DEFAULT_ALGORITHM) if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in ALGORITHMS:
        known = " or ".join(f"'{one}'{' (the default)' * (one == DEFAULT_ALGORITHM)}" for one in ALGORITHMS)
        raise PydanticCustomError("name", f"expected the keys of an optimizer, name being {known}")
    return ALGORITHMS[name].config.model_validate(value)


AnyOptimizer = Annotated[SerializeAsAny[OptimizerConfig], WrapValidator(_validated)]
"""An optimizer of any registered algorithm, by its `name`."""
