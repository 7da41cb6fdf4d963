"""Counter-based randomness: a value is a function of (seed, name, step, sample, index) and of nothing else.

Every grid therefore starts from the same model, whichever rank computes which part, and a serial run is the reference.
The generator is the SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014) over a keyed counter: integer arithmetic
that gives the same bits on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import prod

import torch

AT_ONCE = 1 << 20
"""Most values drawn at once: they take several times 8 bytes each."""

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def stream_key(seed: int, name: str, *counters: int) -> int:
    """Return a signed 64-bit key of the stream of values called `name` (at `counters`, for instance the step)."""
    text = "\x1f".join([str(seed), name, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 right logically; torch has only the arithmetic shift."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_bits(key: int, index: torch.Tensor) -> torch.Tensor:
    """Return 63 random bits (non-negative int64) for each int64 `index`; same shape as `index`."""
    return _shift_right(_words(key, index), 1)


def _words(key: int, index: torch.Tensor) -> torch.Tensor:
    """Return 64 random bits for each int64 `index`."""
    x = index * _GOLDEN
    x += key
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        x ^= _shift_right(x, bits)
        x *= factor
    x ^= _shift_right(x, 31)
    return x


def uniform(key: int, index: torch.Tensor) -> torch.Tensor:
    """Return float64 values in the open interval (0, 1), one for each `index`."""
    # 52 bits: the half added to more of them would round the largest value up to 1.
    return (_shift_right(random_bits(key, index), 11).to(torch.float64) + 0.5) * 2.0**-52


def normal(key: int, index: torch.Tensor) -> torch.Tensor:
    """Return float64 standard normal values, one for each `index`, by the inverse distribution function."""
    values: torch.Tensor = torch.special.ndtri(uniform(key, index))
    return values


def keep_mask(
    keys: Sequence[int], p: float, *, shape: Sequence[int], box: Sequence[slice], device: torch.device | None = None
) -> torch.Tensor:
    """Return the mask of elements that dropout of probability `p` keeps: bool [len(keys), *sizes of `box`].

    `box`: a part of a tensor of `shape`; there is one such tensor for each key. Each element has 32 random bits (so its
    probability is that close to `p`), half a word of the stream, by its place in the whole tensor: the mask of an
    element does not depend on the box.
    """
    shape, box = [1, *shape][-max(2, len(shape)) :], [slice(0, 1), *box][-max(2, len(box)) :]
    *_, last = box
    words = slice(last.start // 2, (last.stop + 1) // 2)
    index = Indices((*shape[:-1], (shape[-1] + 1) // 2), (*box[:-1], words), device=device)
    threshold = keep_threshold(p)
    sizes = [part.stop - part.start for part in box]
    mask = torch.empty(len(keys), *sizes, dtype=torch.bool, device=device)
    rows = max(1, AT_ONCE // max(1, prod(sizes[1:])))
    for start in range(0, sizes[0], rows):
        stop = min(start + rows, sizes[0])
        block = index.block(start, stop)
        for number, key in enumerate(keys):
            halves = _words(key, block).view(torch.int32)[..., last.start % 2 :][..., : sizes[-1]]
            torch.ge(halves, threshold, out=mask[number, start:stop])
    return mask


def keep_elements(
    keys: torch.Tensor, threshold: int, shape: tuple[int, ...], box: tuple[tuple[int, int], ...]
) -> torch.Tensor:
    """Return the same mask as `keep_mask`, in operations that a compiler fuses into one kernel.

    Uncompiled they take 8 bytes per element several times. `keys` [n + 1] as from `packed_keys`; `threshold` as from
    `keep_threshold`; `box`: starts and stops.
    """
    keys, golden = keys[:-1], keys[-1]
    words = (shape[-1] + 1) // 2
    *_, (first, last) = box
    along = torch.arange(first, last, device=keys.device)
    number = along // 2
    stride = words
    for (start, stop), size in zip(reversed(box[:-1]), reversed(shape[:-1]), strict=True):
        number = number + (torch.arange(start, stop, device=keys.device) * stride).view(-1, *[1] * number.dim())
        stride *= size
    word = number * golden + keys.view(-1, *[1] * number.dim())
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        word = (word ^ _shift_right(word, bits)) * factor
    word = word ^ _shift_right(word, 31)
    # The low half of a word is the even element's. Its sign is bit 31.
    half = torch.where(along % 2 == 0, word << 32, word) >> 32
    return half >= threshold


def packed_keys(keys: Sequence[int]) -> torch.Tensor:
    """Return the keys followed by the generator's increment: int64 [n + 1].

    As a constant in the code, compilers would multiply the increment with numbers of elements beyond 64 bits.
    """
    return torch.tensor([*keys, _GOLDEN], dtype=torch.int64, device="cpu")


def keep_threshold(p: float) -> int:
    """Return the threshold for dropout `p`: an element is kept if its 32 random bits, as signed, are at least this."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


class Indices:
    """Row-major indices, in the whole tensor, of the elements of a box of it."""

    def __init__(self, shape: Sequence[int], box: Sequence[slice], *, device: torch.device | None = None) -> None:
        self._device = device
        self._first = box[0].start
        self._row = prod(shape[1:])
        self._within = torch.zeros((), dtype=torch.int64, device=device)
        for dim in range(1, len(shape)):
            along = torch.arange(box[dim].start, box[dim].stop, device=device) * prod(shape[dim + 1 :])
            self._within = self._within.unsqueeze(-1) + along

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Return the indices of rows `start` to `stop` of the box."""
        rows = torch.arange(self._first + start, self._first + stop, device=self._device) * self._row
        return rows.view(-1, *[1] * self._within.dim()) + self._within
