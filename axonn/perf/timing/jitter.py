"""Times that are not the same every time: the spread of predicted batch times."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, sqrt

from axonn.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Each task, each message, each reduction and each update takes its time times a log-normal factor of its own.

    `relative`: standard deviation of the factors, whose mean is 1. `repeats` batches are simulated, and in each all
    replicas, since the reduction waits for the last; equal seeds give equal times.
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
        """Factors one after another, others for other numbers `where`."""
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
        """Of the batch times, in seconds."""
        return sum(self.batch_times_s) / len(self.batch_times_s)

    def percentile(self, percent: float) -> float:
        """Interpolated between the two next to it."""
        times = sorted(self.batch_times_s)
        place = percent / 100 * (len(times) - 1)
        below = int(place)
        above = min(below + 1, len(times) - 1)
        return times[below] + (place - below) * (times[above] - times[below])
