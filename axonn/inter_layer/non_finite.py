"""Detection of the first non-finite value of a batch, without inspecting every value while all goes well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from axonn.inter_layer.batch_shard import Tensors
from axonn.schedules import Direction


@dataclass(frozen=True, order=True)
class NotFinite:
    """A non-finite value that a task passed on; the least of several is the one that came first in the network.

    `backwards`: it is a gradient. `distance`: chunks that the value had passed, counted from the beginning of the
    network for activations and from its end for gradients. `layers`: first and last layer of the chunk.
    """

    backwards: bool
    distance: int
    microbatch: int
    rank: int
    layers: tuple[int, int]

    def __str__(self) -> str:
        first, last = self.layers
        location = f"layer {first}" if first == last else f"layers {first} to {last}"
        value = "gradients that come out of" if self.backwards else "what comes out of"
        return f"{value} {location} for microbatch {self.microbatch}"


class NonFiniteDetector:
    """Detector of non-finite values: keeps, on the device, the sum of the tensors that each task of a batch passes on.

    A sum is finite if and only if all values are. `distances`: distance of each chunk of this rank from the beginning
    of the network, in chunks; `layers`: first and last layer of each; `chunks`: number of chunks of all stages.
    """

    def __init__(
        self,
        *,
        rank: int,
        distances: Sequence[int],
        layers: Sequence[tuple[int, int]],
        chunks: int,
        microbatches: int,
        device: torch.device,
    ) -> None:
        self._rank = rank
        self._distances = distances
        self._layers = layers
        self._chunks = chunks
        # float64, in which no sum of finite float32 values overflows.
        self._sums = torch.zeros(len(Direction), len(layers), microbatches, dtype=torch.float64, device=device)

    def note(self, direction: Direction, chunk: int, microbatch: int, tensors: Tensors) -> None:
        """Add up the tensors that a task passes on."""
        for tensor in tensors:
            if tensor.dtype.is_floating_point:
                self._sums[direction, chunk, microbatch] += tensor.detach().sum(dtype=torch.float64)

    def nan_flag(self) -> torch.Tensor:
        """Return a scalar on the device: 0, or NaN if a gradient was non-finite."""
        return self._sums[Direction.BACKWARD].sum() * 0.0

    def non_finite(self) -> list[NotFinite]:
        """Return all non-finite values that were passed on. Waits for the device."""
        values = []
        for direction, chunk, microbatch in (~self._sums.isfinite()).nonzero().tolist():
            backwards = direction == Direction.BACKWARD
            passed = self._distances[chunk]
            distance = self._chunks - 1 - passed if backwards else passed
            values.append(NotFinite(backwards, distance, microbatch, self._rank, self._layers[chunk]))
        return values
