"""Memory between forward and backward: how much of it there is, and the choice of what to recompute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


def default_checkpoint_blocks(blocks: int, *, limit: int, chunks: int = 1) -> int:
    """Blocks per checkpoint that need the least memory, for a chunk of `blocks` blocks on a stage of `chunks` such.

    With `limit` microbatches in flight a stage of n blocks keeps limit x n / ac inputs and recomputes ac blocks at
    once: least at ac = sqrt(limit n), which is sqrt(N) for N blocks in the network at the published limit, one
    microbatch per stage (Singh & Bhatele, IPDPS 2022, section V-C). Of the divisors of `blocks` the nearest is taken.
    """
    best = math.sqrt(limit * blocks * chunks)
    return min((d for d in range(1, blocks + 1) if blocks % d == 0), key=lambda d: (abs(d - best), d), default=1)


class SavedBytes:
    """Adds up the bytes that autograd keeps for the backward, each storage once."""

    def __init__(self, without: Iterable[torch.Tensor]) -> None:
        self._seen = {t.untyped_storage().data_ptr() for t in without}
        self.bytes = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved inside of the block."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self.add(tensor)
            # Kept as it is, an output that its own node saves would keep itself alive.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
