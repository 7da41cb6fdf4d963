"""The learning rate of each batch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axonn.config.train_config import LearningRateConfig
from axonn.errors import ConfigError
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.optim.learning_rate import learning_rate


def rates(batches: range, *, steps: int | None = None, **schedule: Any) -> list[float]:
    config = AdamWConfig(lr=2.0, schedule=LearningRateConfig(**schedule))
    return [learning_rate(config, batch, steps) for batch in batches]


def test_constant_after_a_linear_warm_up() -> None:
    assert rates(range(3)) == [2.0] * 3
    assert rates(range(6), warmup=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(range(1), warmup=1) == [2.0]


def test_linear_decay_to_the_final_rate() -> None:
    found = rates(range(9), name="linear", warmup=2, decay_until=6, final=0.2)
    assert found == pytest.approx([1.0, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4, 0.4, 0.4], rel=1e-14)


def test_cosine_decay_to_the_final_rate() -> None:
    found = rates(range(7), name="cosine", decay_until=4, final=0.5)
    at = [1 + (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)]
    assert found == pytest.approx([*at, 1.0, 1.0], rel=1e-14)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_decay_ends_with_the_run_unless_it_is_said_where(name: str) -> None:
    assert rates(range(12), name=name, steps=10) == rates(range(12), name=name, decay_until=10)
    assert rates(range(12), name=name, steps=10, decay_until=6) == rates(range(12), name=name, decay_until=6)
    # A trial run that ends before its warm-up does.
    assert rates(range(3), name=name, steps=3, warmup=4) == [0.5, 1.0, 1.5]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_decay_without_an_end_or_with_one_too_early_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="decay_until"):
        rates(range(1), name=name)
    with pytest.raises(ConfigError, match=r"until batch 3.* 3 batches"):
        rates(range(1), name=name, warmup=3, decay_until=3)


@given(
    name=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 20),
    decay=st.integers(1, 40),
    final=st.floats(0, 1),
)
def test_up_to_the_peak_and_never_up_again(name: str, warmup: int, decay: int, final: float) -> None:
    found = rates(range(80), name=name, warmup=warmup, decay_until=warmup + decay, final=final)
    peak = max(warmup - 1, 0)
    assert found[peak] == 2.0
    assert all(a < b for a, b in pairwise(found[: peak + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(found[peak:]))
    assert found[-1] == pytest.approx(2.0 if name == "constant" else 2.0 * final)
