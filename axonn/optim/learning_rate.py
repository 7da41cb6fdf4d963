"""The learning rate of each batch."""

from __future__ import annotations

import math

from axonn.config.train_config import OptimizerConfig
from axonn.errors import ConfigError


def learning_rate(config: OptimizerConfig, batch: int, steps: int | None = None) -> float:
    """Learning rate of batch number `batch` (from 0) of a run of `steps` batches.

    Batch i of the warm-up has `(i + 1) / warmup` of `lr`, so batch 0 already learns and batch `warmup - 1` has all of
    it. Where a decay begins after that, batch `warmup` still has `lr` and batch `decay_until` has `final * lr`, as has
    every later one. Raises `ConfigError` when it is not known, or comes before the warm-up ends, where the decay ends.
    """
    schedule = config.schedule
    end = _end_of_decay(config, steps)
    if batch < schedule.warmup:
        return config.lr * (batch + 1) / schedule.warmup
    if end is None:
        return config.lr
    done = min((batch - schedule.warmup) / (end - schedule.warmup), 1.0) if end > schedule.warmup else 1.0
    left = 1.0 - done if schedule.name == "linear" else (1.0 + math.cos(math.pi * done)) / 2
    return config.lr * (schedule.final + (1.0 - schedule.final) * left)


def _end_of_decay(config: OptimizerConfig, steps: int | None) -> int | None:
    schedule = config.schedule
    if schedule.name == "constant":
        return None
    if schedule.decay_until is None:
        if steps is None:
            raise ConfigError(
                f"the learning rate's {schedule.name} decay has no end: set optimizer.schedule.decay_until, or say how "
                "many steps the run has"
            )
        return steps
    if schedule.decay_until <= schedule.warmup:
        raise ConfigError(
            f"the learning rate decays until batch {schedule.decay_until}, but warms up for {schedule.warmup} batches; "
            "make optimizer.schedule.decay_until larger or optimizer.schedule.warmup smaller"
        )
    return schedule.decay_until
