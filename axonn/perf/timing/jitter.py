"""Random variation of task times, and the spread of predicted batch times."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, sqrt

from axonn.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Multiplication of the time of each task, message, reduction and update by an independent log-normal factor.

    `relative`: standard deviation of the factors, whose mean is 1. `repeats`: batches to simulate, each with all
    replicas, since the reduction waits for the last one. Equal seeds give equal times.
    """

    relative: float
    seed: int = 0
    repeats: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.relative < 10:
            raise ConfigError(f"jitter {self.relative} must be at least 0 and less than 10 (0.1: 10%)")
        if self.repeats < 1:
            raise ConfigError(f"jitter needs at least one batch, not {self.repeats}")

    def noise(self, *where: int) -> Callable[[], float]:
        """Return a function that yields the next factor; each tuple of numbers `where` has its own sequence."""
        variance = log(1 + self.relative**2)
        mean, deviation = -variance / 2, sqrt(variance)
        gauss = random.Random(repr((self.seed, *where))).gauss
        return lambda: exp(gauss(mean, deviation))


@dataclass(frozen=True)
class JitterSpread:
    """Predicted batch times under jitter, in seconds, one for each repeat."""

    batch_times_s: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the batch times in seconds."""
        return sum(self.batch_times_s) / len(self.batch_times_s)

    def percentile(self, percent: float) -> float:
        """Return a percentile of the batch times in seconds, linearly interpolated."""
        times = sorted(self.batch_times_s)
        position = percent / 100 * (len(times) - 1)
        below = int(position)
        above = min(below + 1, len(times) - 1)
        return times[below] + (position - below) * (times[above] - times[below])
