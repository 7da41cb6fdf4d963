"""Dropout whose mask depends only on the position in training: every grid and every recomputation draws the same."""

from __future__ import annotations

import torch
from torch import nn

from axonn.device.devices import on_device
from axonn.errors import ConfigError
from axonn.tensor.context import TensorAxis, TensorContext
from axonn.tensor.counter_random import keep_elements, keep_mask, keep_threshold, packed_keys, stream_key


class Dropout(nn.Module):
    """`nn.Dropout` with counter-based masks.

    [samples, ...] -> the same, with elements zero with probability `p` and the others divided by 1 - p; the input
    itself if p is 0 or the module is in evaluation mode. The mask of an element is a function of the seed, `name`, the
    step and the number of its sample (both from `context.positions.now`), and its place in the whole activation of that
    sample. `cuts`: dims of the activation that are cut (never dim 0, the samples), each with its axis.

    Raises `ConfigError` in forward when the position in training is unknown or has another number of samples than
    the activation has rows.
    """

    def __init__(
        self,
        p: float = 0.5,
        *,
        name: str,
        context: TensorContext,
        cuts: tuple[tuple[int, TensorAxis], ...] = (),
    ) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p of dropout {name} is {p}; it must be at least 0 and below 1")
        if any(dim < 1 for dim, _ in cuts):
            raise ValueError(f"cuts {cuts} of dropout {name}: dims are counted from 1; dim 0 are the samples")
        self.p = p
        self.name = name
        self.context = context
        self.cuts = cuts

    @property
    def active(self) -> bool:
        """True if a forward would drop elements now."""
        return self.training and self.p > 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.active:
            return x
        # Autograd keeps only the mask, one byte per element.
        return x.mul(self._mask(x)).mul(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}, name={self.name!r}, cuts={self.cuts}"

    def _mask(self, x: torch.Tensor) -> torch.Tensor:
        position = self.context.positions.now
        if len(position.samples) != x.shape[0]:
            raise ConfigError(
                f"dropout {self.name} gets {x.shape[0]} rows, but {len(position.samples)} samples are being computed; "
                "it needs the samples in dim 0"
            )
        whole_shape, box = list(x.shape[1:]), [slice(0, n) for n in x.shape[1:]]
        for dim, axis in self.cuts:
            size, index = x.shape[dim], self.context.index(axis)
            whole_shape[dim - 1] = size * self.context.extent(axis)
            box[dim - 1] = slice(index * size, (index + 1) * size)
        seed, step = self.context.seed, position.step
        keys = [stream_key(seed, self.name, step, sample) for sample in position.samples]
        compiler = self.context.compiler
        if compiler.wanted(keep_elements, x):
            packed = on_device(packed_keys(keys), x.device)
            bounds = tuple((side.start, side.stop) for side in box)
            return compiler.run(keep_elements, packed, keep_threshold(self.p), tuple(whole_shape), bounds, like=x)
        return keep_mask(keys, self.p, shape=whole_shape, box=box, device=x.device).view(x.shape)
