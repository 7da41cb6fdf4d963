"""Sums of float64 numbers that do not depend on the order of the addends, nor on which rank holds which of them.

Each addend, an integer of 53 bits times a power of two, is added to int64 digits of a number whose base is 256. Digits
that are not carried add up without rounding, whatever a collective adds first. The idea of one fixed-point accumulator
for all exponents is Kulisch's ("Computer Arithmetic and Validity", 2008); reproducible sums over ranks: Demmel &
Nguyen, IEEE Transactions on Computers 64 (2015).
"""

from __future__ import annotations

import torch

_MANTISSA = 53
_LOW = 27
"""Bits of the lower half of a mantissa; a half shifted by up to 7 bits leaves 2^29 additions until int64 is full."""
_LEAST = -1073
"""Exponent that `frexp` gives the smallest number above zero; that of the largest is 1024."""
_BASE = 8
"""Bits of a digit."""
_PLACES = (1024 - _LEAST + _LOW) // _BASE + 1
DIGITS = _PLACES + 2
"""Length of what is added up. The last two count addends that are infinite, and those that are no numbers."""


def to_digits(addends: torch.Tensor) -> torch.Tensor:
    """Return int64 [DIGITS], on the same device, with the exact sum of `addends`: float64 [n], n below 2^29, none of
    them negative. Digits of several ranks are added elementwise."""
    digits = torch.zeros(DIGITS, dtype=torch.int64, device=addends.device)
    finite = addends.isfinite()
    mantissa, exponent = torch.frexp(addends.where(finite, 0.0))
    integer = (mantissa * 2.0**_MANTISSA).long()
    high = integer >> _LOW
    for half, shift in ((integer - (high << _LOW), exponent - _LEAST), (high, exponent - (_LEAST - _LOW))):
        digits.index_add_(0, shift // _BASE, half << (shift % _BASE))
    digits[-2] = addends.isinf().sum()
    digits[-1] = addends.isnan().sum()
    return digits


def from_digits(digits: torch.Tensor) -> torch.Tensor:
    """Return float64 [1]: the number that `digits` stand for, infinite or NaN as a plain sum would be."""
    places = torch.arange(_PLACES, dtype=torch.float64, device=digits.device)
    # What is below the smallest number above zero is lost, as anywhere.
    values = digits[:_PLACES].double() * torch.exp2(places * _BASE + (_LEAST - _MANTISSA))
    total = values.sum().view(1)
    for count, value in ((digits[-2], float("inf")), (digits[-1], float("nan"))):
        total = torch.where(count > 0, value, total)
    return total
