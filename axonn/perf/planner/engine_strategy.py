"""Conversion between configurations of our engine and strategies of the performance model."""

from __future__ import annotations

from axonn.config.defaults import checkpoint_blocks, sub_shards
from axonn.config.model_config import ModelConfig
from axonn.config.train_config import PrecisionConfig, TrainConfig
from axonn.errors import ConfigError
from axonn.grid import AXES
from axonn.models.registry import outline_of
from axonn.perf.strategy import Strategy
from axonn.schedules import make_schedule

_LIBRARIES: dict[str, str] = {"mpi": "mpi", "torch": "nccl"}
"""Library of each transport: `torch.distributed` uses NCCL, or Gloo without GPUs."""
_ENGINE = {
    "order": AXES,
    "blocking_messages": False,
    # A rank sends its shard to the rank that needs that shard: nothing is gathered.
    "partition_messages": False,
    "partition": "work",
    "overlap_input_gradients": True,
    "accumulate": "in-place",
    "sequence_parallel": False,
    "overlap_reduction": False,
    "optimizer_kernels": "fused",
    # The default of the compute type.
    "agree_on_overflow": None,
}
"""Fields of a strategy that are fixed in the engine."""
_TENSOR_ONLY = frozenset({"partition_messages", "overlap_input_gradients", "sequence_parallel"})
"""Fields among them that have no effect without tensor parallelism."""


def strategy_of_config(config: TrainConfig) -> Strategy:
    """Return the strategy of the engine under `config`. Raises `ConfigError` or `GridError` if the engine refuses it.

    Activation checkpointing "auto" may choose a different number of blocks on each stage; the strategy has that of the
    first stage.
    """
    grid = config.grid
    optimizer = config.optimizer
    phi = config.model.parameters
    fields = {
        "grid": config.grid,
        "microbatch_size": config.microbatch_size,
        "schedule": config.schedule,
        "message_library": _LIBRARIES[config.transport],
        "algorithm": optimizer.name,
        "optimizer": optimizer.placement,
        "bsize": optimizer.bsize,
        # Without k all buckets form one chunk.
        "k": optimizer.k or -(-phi // optimizer.bsize),
        "buckets_resident": optimizer.buckets_resident,
        "compute": config.precision.compute,
        "overdecomposition": sub_shards(config.overdecomposition, microbatch_size=config.microbatch_size, grid=grid),
        "reduce_type": config.precision.gradient_type,
        "clip_norm": optimizer.clip_norm is not None,
        "recompute": "none" if config.activation_checkpointing is None else "full",
        "checkpoint_layers": 1,
        **_ENGINE,
    }
    strategy = Strategy.model_validate(fields)
    microbatches = strategy.microbatches(config.batch_size)
    if config.activation_checkpointing is None:
        return strategy
    outline = outline_of(config.model)
    first = make_schedule(config.schedule, stage=0, stages=grid.inter, microbatches=microbatches)
    span = strategy.spans_of_stages(outline)[0][0]
    blocks = checkpoint_blocks(
        config.activation_checkpointing,
        [outline.links[i].block for i in span],
        limit=first.limit,
        chunks=first.layout.chunks,
    )
    return strategy.model_copy(update={"checkpoint_layers": blocks})


def differences(strategy: Strategy) -> list[str]:
    """Describe the fields of `strategy` in which it differs from the engine while computing the same result."""
    ours = as_the_engine(strategy)
    without_effect = _TENSOR_ONLY if strategy.tensor == 1 else frozenset()
    extents = strategy.grid.extents()
    if [axis for axis in strategy.order if extents[axis] > 1] == [axis for axis in ours.order if extents[axis] > 1]:
        without_effect = without_effect | {"order"}
    if strategy.agreement == ours.agreement:
        without_effect = without_effect | {"agree_on_overflow"}
    return [
        f"{name} {getattr(strategy, name)!r} (the engine: {getattr(ours, name)!r})"
        for name in _ENGINE
        if getattr(strategy, name) != getattr(ours, name) and name not in without_effect
    ]


def as_the_engine(strategy: Strategy) -> Strategy:
    """Return `strategy` without these differences."""
    return strategy.model_copy(update=_ENGINE)


def config_of_strategy(strategy: Strategy, model: ModelConfig, *, batch_size: int, steps: int = 11) -> TrainConfig:
    """Return the configuration with which the engine runs `strategy`; the inverse of `strategy_of_config`.

    Raises `ConfigError` naming what the engine does not support: blocking messages, a sharded optimizer and the like.
    """
    unsupported = differences(strategy)
    if strategy.recompute == "selective":
        unsupported.append("recompute 'selective' (the engine: 'full' or 'none')")
    if strategy.clip_norm:
        unsupported.append("clip_norm without the norm (say it in the configuration's optimizer)")
    if strategy.optimizer == "sharded":
        unsupported.append("optimizer 'sharded' (the engine: 'device' or 'offloaded')")
    if unsupported:
        raise ConfigError(f"the engine does not run a strategy with {', '.join(unsupported)}; change it")
    strategy.microbatches(batch_size)
    (transport,) = [name for name, library in _LIBRARIES.items() if library == strategy.message_library]
    return TrainConfig(
        model=model,
        grid=strategy.grid,
        batch_size=batch_size,
        microbatch_size=strategy.microbatch_size,
        schedule=strategy.schedule,
        optimizer=strategy.update.config(
            name=strategy.algorithm,
            placement="offloaded" if strategy.optimizer == "offloaded" else "device",
            bsize=strategy.bsize,
            k=strategy.k,
            buckets_resident=strategy.buckets_resident,
        ),
        precision=PrecisionConfig(compute=strategy.compute, gradients=strategy.reduce_type),
        activation_checkpointing=strategy.checkpoint_layers if strategy.recompute == "full" else None,
        overdecomposition=strategy.overdecomposition,
        transport="torch" if transport == "torch" else "mpi",
        steps=steps,
    )
