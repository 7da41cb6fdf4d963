"""Strict configuration: YAML files are read into typed models; an unknown key is an error with a suggestion."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from axonn.errors import ConfigError
from axonn.schedules import ChunkPlacement, ScheduleSpec

M = TypeVar("M", bound=BaseModel)


class StrictModel(BaseModel):
    """Base of all configuration and records: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class GPTConfig(StrictModel):
    """A GPT as the papers train it. `vocab` and `seq_len` in tokens; `hidden` must be a multiple of `heads`."""

    name: str
    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    vocab: int = Field(ge=2)
    tied_head: bool = False

    def model_post_init(self, context: Any) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")

    @property
    def parameters(self) -> int:
        """Number of trainable parameters (a tied head counts once)."""
        h = self.hidden
        block = 12 * h * h + 13 * h
        embedding = (self.vocab + self.seq_len) * h
        head = 2 * h + (0 if self.tied_head else self.vocab * h)
        return self.layers * block + embedding + head


class GridConfig(StrictModel):
    """Extents of the process grid."""

    data: int = Field(default=1, ge=1)
    inter: int = Field(default=1, ge=1)
    row: int = Field(default=1, ge=1)
    col: int = Field(default=1, ge=1)


class ScheduleConfig(StrictModel):
    """Which pipeline schedule runs; `in_flight_limit` defaults to twice G_inter.

    `chunks` of layers lie on each stage, placed in loops or in a V (`axonn.schedules.ChunkLayout`).
    """

    name: str = "message-driven"
    in_flight_limit: int | None = Field(default=None, ge=1)
    pick: str = "backward-first"
    chunks: int = Field(default=1, ge=1)
    placement: ChunkPlacement = "loop"

    def spec(self) -> ScheduleSpec:
        return ScheduleSpec(**self.model_dump())


class LearningRateConfig(StrictModel):
    """How the learning rate goes: up to `optimizer.lr` over `warmup` batches, then on as `name` says.

    linear and cosine come down to `final` x lr at batch number `decay_until` (default: the end of the run) and stay.
    """

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(default=0, ge=0)
    decay_until: int | None = Field(default=None, ge=1)
    final: float = Field(default=0.1, ge=0, le=1)


OptimizerPlacement = Literal["device", "offloaded"]


class OptimizerConfig(StrictModel):
    """AdamW; the defaults are those of IPDPS'22, section VI-C.

    With placement "offloaded" (the memory optimisation) master weights and moments lie in host memory, and the step
    streams them through `buckets_resident` buckets of `bsize` elements on the device. Gradients are all-reduced in
    chunks of `k` buckets, the optimizer running on one chunk while the next is reduced; `k: null` makes one chunk of
    all. `clip_norm` is the largest allowed norm of the gradient of the whole model.
    """

    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = Field(default=(0.9, 0.999), strict=False)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    schedule: LearningRateConfig = LearningRateConfig()
    placement: OptimizerPlacement = "device"
    bsize: int = Field(default=4_000_000, ge=1)
    k: int | None = Field(default=4, ge=1)
    buckets_resident: int = Field(default=2, ge=1)


class DataConfig(StrictModel):
    """Text to train on: any text file (as bytes) or a `.bin` file of uint16 tokens; by default Python's own sources.

    The last `held_out` of the text is kept from training, for evaluation; 0.05 of it where there is evaluation and
    this is 0.
    """

    path: str | None = None
    held_out: float = Field(default=0.0, ge=0, lt=1)


FloatType = Literal["float64", "float32", "bfloat16", "float16"]


class PrecisionConfig(StrictModel):
    """Number formats; the name of a type alone stands for `compute`.

    `compute`: parameters, activations and messages. `master`: weights and moments of the optimizer; by default float32
    where `compute` is a half type, else `compute` itself. `gradients`: what microbatches accumulate and all-reduces
    sum, by default `compute`. `loss_scale`: a number, or "dynamic", the default of float16 (1 otherwise), which doubles
    after `growth_interval` steps without overflow.
    """

    compute: FloatType = "float32"
    master: Literal["float64", "float32"] | None = None
    gradients: FloatType | None = None
    loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["dynamic"] | None = None
    growth_interval: int = Field(default=2000, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, data: Any) -> Any:
        return {"compute": data} if isinstance(data, str) else data

    @property
    def master_type(self) -> str:
        return self.master or ("float64" if self.compute == "float64" else "float32")

    @property
    def gradient_type(self) -> str:
        return self.gradients or self.compute

    @property
    def scaling(self) -> float | Literal["dynamic"]:
        return self.loss_scale or ("dynamic" if self.compute == "float16" else 1.0)


class EvaluationConfig(StrictModel):
    """Evaluate on `batches` held-out batches after `every` batches of training."""

    every: int = Field(ge=1)
    batches: int = Field(default=1, ge=1)


class CheckpointConfig(StrictModel):
    """Save a checkpoint after `every` batches and at the end, and keep the last `keep` of them."""

    every: int = Field(ge=1)
    keep: int = Field(default=2, ge=1)


class TrainConfig(StrictModel):
    """One training run. `batch_size` counts sequences over all ranks, `microbatch_size` those of one microbatch.

    `activation_checkpointing`: keep only the input of every that many transformer layers and recompute the rest in the
    backward; "auto" takes the number that needs the least memory. `initial_weights`: a safetensors file to start from.
    """

    model: GPTConfig
    grid: GridConfig = GridConfig()
    batch_size: int = Field(ge=1)
    microbatch_size: int = Field(ge=1)
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    precision: PrecisionConfig = PrecisionConfig()
    activation_checkpointing: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    transport: Literal["mpi", "torch"] = "mpi"
    evaluation: EvaluationConfig | None = None
    checkpoints: CheckpointConfig | None = None
    initial_weights: str | None = None
    seed: int = 0
    steps: int = Field(default=11, ge=1)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader to which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # PyYAML's own error says so.
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML reads 1e-3 as a string, since YAML 1.1 asks for a dot; everyone who writes a learning rate means a number.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path | str) -> Any:
    """The plain content of a YAML file. Raises `ConfigError` naming the file and the place."""
    path = Path(path)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error


def load_yaml(path: Path | str, model: type[M]) -> M:
    """Read a YAML file into `model`. Raises `ConfigError` naming file, key and the nearest valid key."""
    return validate(read_yaml(path), model, where=str(path))


def validate(data: Any, model: type[M], *, where: str) -> M:
    """Check plain data against `model`. Raises `ConfigError` naming `where`, the key and the nearest valid key."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys and values, found {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(item, model) for item in error.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error


def _explain(item: Any, model: type[BaseModel]) -> str:
    location = ".".join(str(part) for part in item["loc"]) or "(top level)"
    if item["type"] == "extra_forbidden":
        known = _keys_at(model, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key '{location}'; {hint}"
    if item["type"] == "missing":
        return f"the key '{location}' is missing"
    return f"'{location}': {item['msg']} (found {item['input']!r})"


def _keys_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Valid keys of the nested model that `location` points to."""
    for part in location:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        found = _nested_model(model.model_fields[part].annotation)
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _nested_model(argument)
        if found is not None:
            return found
    return None
