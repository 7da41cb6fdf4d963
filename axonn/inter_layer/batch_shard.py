"""One batch shard on its way through a stage, cut into microbatches, and these into sub-shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from axonn.device.devices import on_device

Tensors = tuple[torch.Tensor, ...]
Inputs = torch.Tensor | Tensors


class Batch:
    """Inputs and targets of one rank's batch shard, where its stage needs them, and the losses computed so far.

    `samples` are the global numbers of the rows, in batch number `step`. The tensors are copied to `device` without
    making the host wait.
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
        tensors = () if inputs is None else (inputs,) if isinstance(inputs, torch.Tensor) else inputs
        self._inputs = tuple(on_device(tensor, device) for tensor in tensors)
        self._targets = None if targets is None else on_device(targets, device)
        self._samples = samples
        self.step = step
        self.losses: dict[int, torch.Tensor] = {}
        """Mean loss of each finished microbatch, detached."""

    def inputs(self, rows: range) -> Tensors:
        """Return the inputs of some rows of the shard."""
        return tuple(t[rows.start : rows.stop] for t in self._inputs)

    def targets(self, rows: range) -> torch.Tensor:
        """Return the targets of some rows of the shard; only on the stage that computes the loss."""
        assert self._targets is not None, "the engine checks that the stage with the loss has targets"
        return self._targets[rows.start : rows.stop]

    def samples(self, rows: range) -> Sequence[int]:
        """Return the global sample numbers of some rows of the shard."""
        return self._samples[rows.start : rows.stop]

    def add_loss(self, microbatch: int, loss: torch.Tensor, share: float) -> None:
        """Add the mean loss of a sub-shard, weighted by `share`, its share of the microbatch's rows."""
        weighted = loss.detach() if share == 1.0 else loss.detach() * share
        self.losses[microbatch] = self.losses[microbatch] + weighted if microbatch in self.losses else weighted

    def loss(self) -> torch.Tensor | None:
        """Return the sum of the losses in the order of the microbatches; None on stages without a loss."""
        return torch.stack([self.losses[m] for m in sorted(self.losses)]).sum() if self.losses else None


def cut_rows(rows: int, parts: int) -> list[range]:
    """Return `parts` consecutive ranges of nearly equal length that cover `rows`, the longer ones first."""
    length, remainder = divmod(rows, parts)
    stops = [length * (i + 1) + min(i + 1, remainder) for i in range(parts)]
    return [range(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
