"""megatron-core on this machine: its GPT under each of its kinds of parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from axonn.config.train_config import FloatType, TrainConfig
from axonn.schedules import ScheduleSpec
from baselines.adapters.adapter_common import DEVICE, gpt_of
from baselines.adapters.isolated_framework import ForeignFramework
from baselines.environments import Environment

ENVIRONMENT = Environment("megatron", "megatron-core")
DISCLOSURE = (
    "megatron-core through a shim for machines without a GPU: its algorithm without its fused kernels, and so without "
    "gradients accumulated inside of products and without sequence parallelism, which ask for them"
)
LEAST_CHUNKS = 2
"""Fewest chunks of layers on each stage in the interleaved schedule."""


class Megatron(ForeignFramework):
    """Checks and environment that all strategies share: the local layers of its GPT, exact GELU, an untied head."""

    disclosure = DISCLOSURE if DEVICE.type == "cpu" else None
    environment = ENVIRONMENT
    script = "megatron_ranks.py"
    precisions: ClassVar[Sequence[FloatType]] = ("float32", "bfloat16")
    axes: ClassVar[Sequence[str]]
    """Axes of the grid along which the strategy cuts."""

    def refuses(self, config: TrainConfig) -> str | None:
        return self._wrong_grid(config) or self._wrong_sizes(config)

    def _wrong_grid(self, config: TrainConfig) -> str | None:
        extents = config.grid.extents()
        if extents["row"] > 1:
            return "Megatron-LM cuts layers along col only: set row to 1"
        uncut = [axis for axis, extent in extents.items() if extent > 1 and axis not in self.axes]
        if uncut:
            return f"{self.label} cuts along {' and '.join(self.axes)} only: set {', '.join(uncut)} to 1"
        return None

    def _wrong_sizes(self, config: TrainConfig) -> str | None:
        grid, model = config.grid, gpt_of(config)
        if config.precision.compute not in self.precisions:
            return f"{self.label} runs in {' or '.join(self.precisions)} here: set precision to float32"
        if model.tied_head:
            return "Megatron-LM is compared with an untied head: set model.tied_head to false"
        for name, size, axis, extent in (
            ("heads", model.heads, "col", grid.col),
            ("vocab", model.vocab, "col", grid.col),
            ("layers", model.layers, "inter", grid.inter * self.chunks(config)),
            ("batch_size", config.batch_size, "data x microbatch_size", grid.data * config.microbatch_size),
        ):
            if size % extent:
                return f"Megatron-LM needs {name} ({size}) to be a multiple of {extent} ({axis}): change one of them"
        return None

    def chunks(self, config: TrainConfig) -> int:
        """Return the number of chunks of layers on each stage."""
        return 1

    def schedule(self, config: TrainConfig) -> ScheduleSpec | None:
        return ScheduleSpec(name="1f1b") if config.grid.inter > 1 else None


class Tensor(Megatron):
    """Layers cut along col; an input's gradient is all-reduced while the weight's gradient is computed."""

    label = "Megatron-LM tensor"
    strategy = "tensor"
    axes = ("col",)


class MegatronPipeline(Megatron):
    """1F1B: one stage per rank."""

    label = "Megatron-LM 1F1B"
    strategy = "pipeline"
    axes = ("inter",)


class Interleaved(Megatron):
    """Interleaved 1F1B: several chunks of layers per stage, messages overlapped with compute."""

    label = "Megatron-LM interleaved 1F1B"
    strategy = "interleaved"
    axes = ("inter",)

    def refuses(self, config: TrainConfig) -> str | None:
        stages = config.grid.inter
        if stages < 2:
            return "the interleaved schedule needs at least 2 stages: raise inter, or take megatron/pipeline"
        if (reason := super().refuses(config)) is not None:
            return reason
        if (count := config.batch_size // config.microbatch_size) % stages:
            return f"the interleaved schedule needs microbatches ({count}) in multiples of inter = {stages}"
        return None

    def chunks(self, config: TrainConfig) -> int:
        return max(config.schedule.chunks, LEAST_CHUNKS)

    def schedule(self, config: TrainConfig) -> ScheduleSpec | None:
        return ScheduleSpec(name="interleaved-1f1b", chunks=self.chunks(config))


class MegatronData(Megatron):
    """Replicas whose gradients are all-reduced bucket by bucket during the last backward."""

    label = "Megatron-LM data"
    strategy = "data"
    axes = ("data",)


class DistributedOptimizer(MegatronData):
    """Replicas that shard the optimizer state: gradients reduce-scattered, parameters gathered during the forward."""

    # Its optimizer has settings of its own for half types.
    precisions = ("float32",)
    label = "Megatron-LM distributed optimizer"
    strategy = "data-distributed-optimizer"

    def refuses(self, config: TrainConfig) -> str | None:
        if config.grid.data < 2:
            return "there is nothing to share the optimizer's state with: raise data"
        return super().refuses(config)


class Combined(Megatron):
    """Replicas of pipelines of layers cut along col."""

    label = "Megatron-LM combined"
    strategy = "combined"
    axes = ("data", "inter", "col")
