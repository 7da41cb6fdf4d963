"""Memory between forward and backward: how much of it there is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class SavedBytes:
    """Adds up the bytes that autograd keeps for the backward, each storage once."""

    def __init__(self, without: Iterable[torch.Tensor]) -> None:
        self._seen = {t.untyped_storage().data_ptr() for t in without}
        self.bytes = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once."""
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
