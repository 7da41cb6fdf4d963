"""Counter-based randomness: a value is a function of (seed, name, step, sample, index) and of nothing else.

So every grid starts from the same model, whoever computes which part of it, and a serial run is the reference for all.
The generator is the SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014) over a keyed counter: integer arithmetic
that gives the same bits on every device.
"""

from __future__ import annotations

import hashlib

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def stream_key(seed: int, name: str, *counters: int) -> int:
    """A signed 64-bit key for the stream of values called `name` (at `counters`, for instance the step)."""
    text = "\x1f".join([str(seed), name, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64, of which torch only has the arithmetic one."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_bits(key: int, index: torch.Tensor) -> torch.Tensor:
    """63 random bits (non-negative int64) for each int64 `index`; same shape as `index`."""
    x = index * _GOLDEN + key
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return _shift_right(x ^ _shift_right(x, 31), 1)


def uniform(key: int, index: torch.Tensor) -> torch.Tensor:
    """float64 values in the open interval (0, 1), one for each `index`."""
    # 52 bits: the half added to more of them would round the largest value up to 1.
    return (_shift_right(random_bits(key, index), 11).to(torch.float64) + 0.5) * 2.0**-52


def normal(key: int, index: torch.Tensor) -> torch.Tensor:
    """float64 standard normal values, one for each `index` (by the inverse of the distribution function)."""
    values: torch.Tensor = torch.special.ndtri(uniform(key, index))
    return values


def normal_(tensor: torch.Tensor, *, seed: int, name: str, std: float, first: int = 0) -> torch.Tensor:
    """Fill `tensor` with normal values of mean 0; element i is value `first + i` of the stream called `name`."""
    key = stream_key(seed, name)
    flat = tensor.detach().view(-1)
    chunk = 1 << 20
    for start in range(0, flat.numel(), chunk):
        stop = min(start + chunk, flat.numel())
        index = torch.arange(first + start, first + stop, dtype=torch.int64)
        flat[start:stop].copy_(normal(key, index).mul_(std))
    return tensor
