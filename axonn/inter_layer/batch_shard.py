"""One batch shard on its way through a stage: cut into microbatches, and these into sub-shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from axonn.device.devices import on_device

Tensors = tuple[torch.Tensor, ...]
Inputs = torch.Tensor | Tensors


class Batch:
    """The inputs and targets of one rank's pipeline, where it has them, and the losses that have come of them.

    `samples` are the global numbers of the rows, in batch number `step`. Computed on `device`, to which the host copies
    without waiting.
    """

    def __init__(
        self,
        inputs: Inputs | None,
        targets: torch.Tensor | None,
        *,
        step: int,
        samples: Sequence[int],
        device: torch.device,
    ) -> None:
        given = () if inputs is None else (inputs,) if isinstance(inputs, torch.Tensor) else inputs
        self._inputs = tuple(on_device(tensor, device) for tensor in given)
        self._targets = None if targets is None else on_device(targets, device)
        self._samples = samples
        self.step = step
        self.losses: dict[int, torch.Tensor] = {}
        """Mean loss of each microbatch that is done, without a graph."""

    def inputs(self, rows: range) -> Tensors:
        """What the network begins with, for some rows of the shard."""
        return tuple(t[rows.start : rows.stop] for t in self._inputs)

    def targets(self, rows: range) -> torch.Tensor:
        """Of these rows of the batch. Only the stage with the loss has any."""
        assert self._targets is not None, "the engine checks that the stage with the loss has targets"
        return self._targets[rows.start : rows.stop]

    def samples(self, rows: range) -> Sequence[int]:
        """Global numbers of some rows of the shard."""
        return self._samples[rows.start : rows.stop]

    def add_loss(self, microbatch: int, loss: torch.Tensor, share: float) -> None:
        """Add the mean loss of a sub-shard, which is this share of its microbatch."""
        part = loss.detach() if share == 1.0 else loss.detach() * share
        self.losses[microbatch] = self.losses[microbatch] + part if microbatch in self.losses else part

    def loss(self) -> torch.Tensor | None:
        """Sum of the losses in the order of the microbatches; None where none was computed."""
        return torch.stack([self.losses[m] for m in sorted(self.losses)]).sum() if self.losses else None


def cut_rows(rows: int, parts: int) -> list[range]:
    """Consecutive ranges of nearly equal length, the longer ones first."""
    share, rest = divmod(rows, parts)
    stops = [share * (i + 1) + min(i + 1, rest) for i in range(parts)]
    return [range(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
