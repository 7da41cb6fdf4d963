"""Sums that no order of the addends changes, and that are right to the last bit."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axonn.optim.exact_sum import DIGITS, from_digits, to_digits

LARGEST = torch.finfo(torch.float64).max
# Digits are exact, the number that is put together of them is rounded: of a few that overlap, once each.
BOUND = 8 * torch.finfo(torch.float64).eps
addends = st.lists(st.floats(0, 1e300, allow_subnormal=True), max_size=40)


def total(*ranks: Sequence[float]) -> float:
    """The sum of what ranks hold, as an all-reduce adds it up."""
    digits = torch.zeros(DIGITS, dtype=torch.int64)
    for rank in ranks:
        digits += to_digits(torch.tensor(rank, dtype=torch.float64))
    return float(from_digits(digits))


@given(addends, st.randoms())
def test_no_order_and_no_way_to_share_them_out_changes_a_bit(values: list[float], shuffled: random.Random) -> None:
    expected = total(values)
    # Numbers below 2^-1022 are not normalised, and what is added up of digits may lose them.
    assert expected == pytest.approx(math.fsum(values), rel=BOUND, abs=2.0**-1022)
    shuffled.shuffle(values)
    at = shuffled.randint(0, len(values))
    assert total(values) == total(values[:at], [], values[at:]) == expected


def test_what_is_small_beside_the_rest_counts_all_the_same() -> None:
    assert total([2.0**60], [1.0] * 4096) == 2.0**60 + 4096
    assert sum([2.0**60, *[1.0] * 4096]) == 2.0**60


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0**-1022, 2.0**-537, math.pi, LARGEST, math.inf])
def test_one_addend_is_its_own_sum(value: float) -> None:
    assert total([value]) == value


def test_what_is_no_number_stays_so() -> None:
    assert math.isnan(total([1.0, math.nan], [2.0]))
    assert math.isnan(total([math.inf], [math.nan]))
    assert total([math.inf, 1.0], [2.0]) == math.inf
    assert total([LARGEST], [LARGEST]) == math.inf


def test_a_million_of_the_largest_digits_do_not_overflow() -> None:
    value = math.nextafter(2.0, 1.0) * 2.0**6
    assert total(*[[value] * 2**15] * 32) == pytest.approx(2**20 * value, rel=BOUND)
