"""Elementwise work on a CPU whose bits do not depend on where in a tensor an element lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

_LANES = 16
"""Elements that the widest vectors of a CPU hold, and a multiple of what all others hold."""


def whole_vectors(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield `tensors`, which have one dim and one length, in parts that are to be changed in place before the next.

    PyTorch's kernels compute whole vectors of elements with other instructions than the few that are left over, which
    may round otherwise. So on a CPU the rest comes as a part of its own, filled up to a whole vector, and is copied
    back. On other devices everything comes at once.
    """
    length = len(tensors[0])
    rest = length % _LANES if tensors[0].is_cpu else 0
    if rest < length:
        yield [tensor[: length - rest] for tensor in tensors]
    if rest:
        left_over = [tensor[length - rest :] for tensor in tensors]
        filled = [torch.cat([part, part.new_zeros(_LANES - rest)]) for part in left_over]
        yield filled
        for part, whole in zip(left_over, filled, strict=True):
            part.copy_(whole[:rest])
