"""The loss scale: when gradients are watched for overflow, when it halves and when it doubles."""

from __future__ import annotations

from typing import Any

import pytest

from axonn.config.train_config import PrecisionConfig, validate
from axonn.errors import ConfigError
from axonn.optim.loss_scale import SMALLEST_SCALE, LossScale


def scale_of(**precision: Any) -> LossScale:
    return LossScale(PrecisionConfig(**precision))


@pytest.mark.parametrize(
    ("precision", "value", "watched"),
    [
        ({"compute": "float32"}, 1.0, False),
        ({"compute": "float32", "loss_scale": 8.0}, 8.0, False),
        ({"compute": "float32", "loss_scale": "dynamic"}, 2.0**16, True),
        ({"compute": "bfloat16"}, 1.0, False),
        ({"compute": "bfloat16", "loss_scale": 128.0}, 128.0, True),
        ({"compute": "float16"}, 2.0**16, True),
        ({"compute": "float16", "loss_scale": 1.0}, 1.0, False),
        ({"compute": "float32", "gradients": "float16", "loss_scale": 4.0}, 4.0, True),
    ],
)
def test_what_the_precision_asks_for(precision: dict[str, Any], value: float, watched: bool) -> None:
    scale = scale_of(**precision)
    assert (scale.value, scale.watched) == (value, watched)


def test_halves_at_an_overflow_and_doubles_after_enough_good_steps_in_a_row() -> None:
    scale = scale_of(compute="float16", growth_interval=3)
    found = []
    for overflow in [True, False, False, True, False, False, False, False]:
        scale.update(overflow=overflow)
        found.append(scale.value / 2.0**16)
    assert found == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5]


def test_a_constant_stays_and_a_dynamic_one_has_an_end() -> None:
    constant, dynamic = scale_of(compute="float16", loss_scale=64.0), scale_of(compute="float16")
    for _ in range(100):
        constant.update(overflow=True)
        dynamic.update(overflow=True)
    constant.load(2.0, 1)
    assert constant.value == 64.0
    assert dynamic.value == SMALLEST_SCALE


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan"), "auto"])
def test_a_scale_that_is_none_is_an_error(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="loss_scale"):
        validate({"compute": "float16", "loss_scale": wrong}, PrecisionConfig, where="test")
