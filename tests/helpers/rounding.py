"""Bounds on what rounding may do, which hold on any processor.

Two runs that compute the same function add in other orders, with other instructions (fused or not, vectors of 4 to 16
elements, half types in their own units or converted), and so differ by roundings, no more. A result that goes through n
roundings of relative size u, one after the other, is off by at most n u (1 + n u) (Higham, "Accuracy and Stability of
Numerical Algorithms", 2002, section 3.1); where they do not all go the same way, by about sqrt(n) u, with a probability
that a few times that make negligible (Higham & Mary, SIAM Journal on Scientific Computing 41, 2019). So a bound here is

    SIGMAS * sqrt(n) * u

of the largest value of a tensor, never of each of its elements: of these some cancel to almost nothing. n is counted
from what is computed: the roundings on the longest way from the inputs to the result, and those of a sum its length. A
test names n; the processor does not enter, since n is the same on all of them.

A bound must also be able to fail: an all-reduce that is missing, or a factor of 2, changes a result by its own size, a
thing left out of a sum of m equal ones by 1 / m.
"""

from __future__ import annotations

import math
import os

import torch

SIGMAS = 4.0
"""A normal distribution exceeds so many deviations once in 16,000 times; and u is the largest error of a rounding, its
deviation u / sqrt(3)."""
MARGIN = "AXONN_ROUNDING_MARGIN"
"""Of the environment: how many times smaller bounds are to be, to see how much room they have."""


def unit_roundoff(dtype: torch.dtype | str) -> float:
    """The largest relative error of one rounding to the nearest number: 2^-8 in bfloat16, 2^-11 in float16, 2^-24 in
    float32, 2^-53 in float64."""
    found = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return torch.finfo(found).eps / 2


def bound(dtype: torch.dtype | str, roundings: int) -> float:
    """The largest difference, relative to the largest value, that so many roundings in `dtype` explain."""
    return tightened(SIGMAS * math.sqrt(roundings) * unit_roundoff(dtype))


def tightened(value: float) -> float:
    """A bound with the margin that the environment asks for, by default none."""
    return value / float(os.environ.get(MARGIN, "1"))
