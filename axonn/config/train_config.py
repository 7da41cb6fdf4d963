"""Configuration of a training run, as typed models; an unknown key is an error with a suggestion."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from axonn.config.loading import StrictModel, load_yaml, read_yaml, validate
from axonn.config.model_config import AnyModel
from axonn.config.optimizer_config import AnyOptimizer, LearningRateConfig, OptimizerConfig, OptimizerPlacement
from axonn.grid import ProcessGrid
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.schedules import ScheduleSpec

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "FloatType",
    "LearningRateConfig",
    "OptimizerConfig",
    "OptimizerPlacement",
    "PrecisionConfig",
    "StrictModel",
    "TrainConfig",
    "load_yaml",
    "read_yaml",
    "validate",
]


class DataConfig(StrictModel):
    """Training data; the share `held_out` at its end is kept for evaluation (0 stands for 0.05 where there is some).

    `path` for a GPT: any text file (as bytes) or a `.bin` file of uint16 tokens; by default Python's own sources. For a
    U-Net: a folder of images, an `.npy` or `.npz` file of them, or a CIFAR-10 or CIFAR-100 archive (or its folder); by
    default scikit-learn's digits.
    """

    path: str | None = None
    held_out: float = Field(default=0.0, ge=0, lt=1)


FloatType = Literal["float64", "float32", "bfloat16", "float16"]


class PrecisionConfig(StrictModel):
    """Number formats; the name of a type alone stands for `compute`.

    `compute`: parameters, activations and messages. `master`: weights and moments of the optimizer; by default float32
    where `compute` is a half type, else `compute` itself. `gradients`: the type in which microbatches accumulate and
    all-reduces sum, by default `compute`. `loss_scale`: a number, or "dynamic", the default of float16 (1 otherwise),
    which doubles after `growth_interval` steps without overflow.
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
        """Type of the master weights, which the optimizer keeps."""
        return self.master or ("float64" if self.compute == "float64" else "float32")

    @property
    def gradient_type(self) -> str:
        """Type in which gradients are accumulated and reduced."""
        return self.gradients or self.compute

    @property
    def scaling(self) -> float | Literal["dynamic"]:
        """Loss scale: a number (1.0 leaves the loss as it is) or "dynamic"."""
        return self.loss_scale or ("dynamic" if self.compute == "float16" else 1.0)


class EvaluationConfig(StrictModel):
    """Evaluation on `batches` held-out batches, after every `every` batches of training."""

    every: int = Field(ge=1)
    batches: int = Field(default=1, ge=1)


class CheckpointConfig(StrictModel):
    """Checkpoints, saved after every `every` batches and at the end; the last `keep` of them stay."""

    every: int = Field(ge=1)
    keep: int = Field(default=2, ge=1)


class TrainConfig(StrictModel):
    """One training run. `batch_size` counts sequences (or images) over all ranks, `microbatch_size` those of one
    microbatch.

    `activation_checkpointing`: keep only the input of every so many transformer layers (or residual blocks) and
    recompute the rest in the backward; "auto" takes the number that needs the least memory. `overdecomposition`: number
    of sub-shards of a microbatch, of which one computes while collectives of another are under way; by default 2 where
    layers are cut and a microbatch has 2 rows. `compile`: whether losses, masks and norms of images go through
    `torch.compile`; "auto" does so on GPUs. `initial_weights`: a safetensors file to start from. `stall_limit_s`: a run
    is ended once no rank has finished anything, neither a task nor a message, for so many seconds.
    """

    model: AnyModel
    grid: ProcessGrid = ProcessGrid()
    batch_size: int = Field(ge=1)
    microbatch_size: int = Field(ge=1)
    schedule: ScheduleSpec = ScheduleSpec()
    optimizer: AnyOptimizer = AdamWConfig()
    data: DataConfig = DataConfig()
    precision: PrecisionConfig = PrecisionConfig()
    activation_checkpointing: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    overdecomposition: int | None = Field(default=None, ge=1)
    transport: Literal["mpi", "torch"] = "mpi"
    compile: Literal["auto", "always", "never"] = "auto"
    evaluation: EvaluationConfig | None = None
    checkpoints: CheckpointConfig | None = None
    initial_weights: str | None = None
    seed: int = 0
    steps: int = Field(default=11, ge=1)
    stall_limit_s: float = Field(default=1800.0, gt=0)
