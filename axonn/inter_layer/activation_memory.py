"""Measurement of the activation memory that a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class SavedBytes:
    """Counter of the bytes that autograd saves for the backward, each storage once; those of `without` do not count."""

    def __init__(self, without: Iterable[torch.Tensor]) -> None:
        self._seen = {t.untyped_storage().data_ptr() for t in without}
        self.bytes = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor, unless it has been counted."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the tensors that autograd saves inside the block."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self.add(tensor)
            # Detached, since an output saved by its own node would keep itself alive.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
