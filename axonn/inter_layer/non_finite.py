"""Where the first value of a batch came from that is not finite, without a look at every value while all goes well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from axonn.inter_layer.batch_shard import Tensors
from axonn.schedules import Direction


@dataclass(frozen=True, order=True)
class NotFinite:
    """What a task handed on that is not finite; the least of several is the one that came first in the network.

    `backwards`: a gradient. `distance`: chunks that the values had passed, from the beginning of the network forwards,
    from its end backwards. `layers`: those of the chunk, the first and the last.
    """

    backwards: bool
    distance: int
    microbatch: int
    rank: int
    layers: tuple[int, int]

    def __str__(self) -> str:
        first, last = self.layers
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        what = "gradients that come out of" if self.backwards else "what comes out of"
        return f"{what} {where} for microbatch {self.microbatch}"


class NonFiniteDetector:
    """A number for each task of a batch, finite where all that the task handed on is: its sum, kept on the device.

    `distances`: of each chunk of this rank, forwards; `layers`: its first and last layer; `chunks`: of all stages.
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
        """What a task hands on."""
        for tensor in tensors:
            if tensor.dtype.is_floating_point:
                self._sums[direction, chunk, microbatch] += tensor.detach().sum(dtype=torch.float64)

    def poison(self) -> torch.Tensor:
        """A scalar on the device: 0, or not a number where a gradient was not finite."""
        return self._sums[Direction.BACKWARD].sum() * 0.0

    def found(self) -> list[NotFinite]:
        """Everything that was not finite. Waits for the device."""
        found = []
        for direction, chunk, microbatch in (~self._sums.isfinite()).nonzero().tolist():
            backwards = direction == Direction.BACKWARD
            passed = self._distances[chunk]
            distance = self._chunks - 1 - passed if backwards else passed
            found.append(NotFinite(backwards, distance, microbatch, self._rank, self._layers[chunk]))
        return found
