"""DeepSpeed's strategies on this machine: ZeRO by stage, with or without offloading, and the pipeline engine."""

from __future__ import annotations

from collections.abc import Mapping

from axonn.config.train_config import FloatType, TrainConfig
from axonn.errors import ConfigError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.schedules import ScheduleSpec
from axonn.training.framework import Framework
from baselines.adapters.isolated_framework import ForeignFramework, stage_settings, stage_starts
from baselines.environments import Environment

ENVIRONMENT = Environment("deepspeed", "deepspeed")
OFFLOAD_DISCLOSURE = (
    "On a machine without a GPU the offloaded state lies where it would lie anyway: what is measured is CPUAdam and "
    "the copies into its buffers, not what ZeRO-Offload saves."
)


HALF_TOO: tuple[FloatType, ...] = ("float32", "bfloat16")


class DeepSpeed(ForeignFramework):
    """Checks and environment that all strategies share.

    Only ZeRO-1 and ZeRO-2 run in bfloat16: like our engine they keep float32 masters beside bfloat16 parameters and
    gradients, while the other strategies treat gradients in ways of their own.
    """

    environment = ENVIRONMENT
    script = "deepspeed_ranks.py"

    def refuses(self, config: TrainConfig) -> str | None:
        grid, precision = config.grid, config.precision.compute
        if precision not in self.precisions:
            known = " or ".join(self.precisions)
            return f"{self.label} is run in {known} here, not in {precision}; set precision: float32"
        if grid.tensor > 1:
            return "DeepSpeed has no tensor parallelism of its own; set grid.row and grid.col to 1"
        if config.batch_size % (grid.data * config.microbatch_size):
            return (
                f"batch_size {config.batch_size} is no multiple of G_data x microbatch_size = {grid.data} x "
                f"{config.microbatch_size}; change one of them"
            )
        return None


class Zero(DeepSpeed):
    """Data parallelism, nothing sharded: gradients are all-reduced."""

    label = "DeepSpeed DDP (ZeRO-0)"
    strategy = "zero-0"

    def refuses(self, config: TrainConfig) -> str | None:
        if config.grid.inter > 1:
            return "ZeRO is data parallelism: set grid.inter to 1, or take deepspeed/pipeline"
        return super().refuses(config)


class Zero1(Zero):
    """Data parallelism, optimizer state sharded over the replicas."""

    precisions = HALF_TOO
    label = "DeepSpeed ZeRO-1"
    strategy = "zero-1"


class Zero2(Zero):
    """Data parallelism, optimizer state and gradients sharded over the replicas."""

    precisions = HALF_TOO
    label = "DeepSpeed ZeRO-2"
    strategy = "zero-2"


class Zero3(Zero):
    """Data parallelism, optimizer state, gradients and parameters sharded over the replicas."""

    label = "DeepSpeed ZeRO-3"
    strategy = "zero-3"


class Zero1Offload(Zero1):
    """ZeRO-1 with the optimizer's state in host memory, stepped there by CPUAdam."""

    label = "DeepSpeed ZeRO-1 offload"
    disclosure = OFFLOAD_DISCLOSURE
    strategy = "zero-1-offload"


class Zero2Offload(Zero2):
    """ZeRO-2 with the optimizer's state in host memory, stepped there by CPUAdam."""

    label = "DeepSpeed ZeRO-2 offload"
    disclosure = OFFLOAD_DISCLOSURE
    strategy = "zero-2-offload"


class Zero3Offload(Zero3):
    """ZeRO-3 with the optimizer's state in host memory, stepped there by CPUAdam."""

    label = "DeepSpeed ZeRO-3 offload"
    disclosure = OFFLOAD_DISCLOSURE
    strategy = "zero-3-offload"


class DeepSpeedPipeline(DeepSpeed):
    """PipelineModule (1F1B), stages cut as in our engine; with replicas, ZeRO-1 over them."""

    label = "DeepSpeed pipeline"
    strategy = "pipeline"

    def refuses(self, config: TrainConfig) -> str | None:
        if config.grid.inter == 1:
            return "DeepSpeed's pipeline engine needs at least 2 stages; raise grid.inter, or take deepspeed/zero-1"
        if isinstance(config.model, GPTConfig) and config.model.tied_head:
            return "DeepSpeed ties whole layers, not an embedding with a head that has a norm as well; untie the head"
        try:
            stage_starts(config)
        except ConfigError as error:
            return str(error)
        return super().refuses(config)

    def schedule(self, config: TrainConfig) -> ScheduleSpec | None:
        return ScheduleSpec(name="1f1b")

    def settings(self, config: TrainConfig) -> Mapping[str, str]:
        return stage_settings(stage_starts(config))


KINDS: tuple[type[DeepSpeed], ...] = (
    Zero,
    Zero1,
    Zero2,
    Zero3,
    Zero1Offload,
    Zero2Offload,
    Zero3Offload,
    DeepSpeedPipeline,
)
STRATEGIES: Mapping[str, type[Framework]] = {kind.strategy: kind for kind in KINDS}
