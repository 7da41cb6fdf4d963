"""The factor that keeps half-precision gradients from vanishing."""

from __future__ import annotations

from axonn.config.train_config import PrecisionConfig

FIRST_SCALE = 2.0**16
SMALLEST_SCALE = 2.0**-24
"""A gradient that still overflows at this scale is not one that a scale can help."""
_HALF = ("float16", "bfloat16")


class LossScale:
    """A constant, or one that halves at each overflow and doubles after `growth_interval` steps without any.

    Micikevicius et al., Mixed Precision Training, ICLR 2018, section 3.2. `watched`: whether gradients must be tested
    for overflow before each update.
    """

    def __init__(self, precision: PrecisionConfig) -> None:
        scaling = precision.scaling
        self._dynamic = scaling == "dynamic"
        self._interval = precision.growth_interval
        self.value = FIRST_SCALE if scaling == "dynamic" else float(scaling)
        self.good_steps = 0
        half = precision.compute in _HALF or precision.gradient_type in _HALF
        self.watched = self._dynamic or (half and self.value != 1.0)

    def update(self, *, overflow: bool) -> None:
        """Take note of a step."""
        if not self._dynamic:
            return
        if overflow:
            self.value = max(self.value / 2, SMALLEST_SCALE)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps >= self._interval:
            self.value *= 2
            self.good_steps = 0

    def load(self, value: float, good_steps: int) -> None:
        """Go on from a checkpoint; a constant stays what the configuration says."""
        if self._dynamic:
            self.value, self.good_steps = value, good_steps
