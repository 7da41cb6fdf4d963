"""Flat buffers of which a rank's parameters and gradients are views, and how they are cut into chunks and buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch
from torch import nn

from axonn.config.train_config import PrecisionConfig
from axonn.errors import ConfigError
from axonn.grid import Axis, ProcessGrid
from axonn.inter_layer.stage import ParameterSpec


@dataclass(frozen=True)
class FlatEntry:
    """A parameter's elements in the flat buffers. `axes`: those of more than one rank along which it is partial."""

    spec: ParameterSpec
    where: slice
    axes: tuple[Axis, ...]

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """This parameter's part of a flat buffer, in its shape."""
        return flat[self.where].view(self.spec.parameter.shape)


@dataclass(frozen=True)
class ReductionChunk:
    """Elements that are reduced at once, over `axes`, and the buckets that the optimizer then works on."""

    axes: tuple[Axis, ...]
    where: slice
    buckets: tuple[slice, ...]


class FlatParameters:
    """One buffer of all parameters and one of all gradients, which the parameters of `specs` become views of.

    Parameters that are partial along the same axes lie together. The elements of one are consecutive and in the order
    of its dims, in these and in all buffers of the optimizer's state: `entries` has its slice by its name and views it
    in its shape, so that an algorithm can take whole matrices where buckets cut through them. Gradients of
    `shared_with` parameters have a buffer of their own. The contents of `parameters` are left to the caller. Raises
    `ConfigError` for a parameter that does not have the compute type.
    """

    def __init__(
        self, specs: Sequence[ParameterSpec], *, grid: ProcessGrid, precision: PrecisionConfig, device: torch.device
    ) -> None:
        compute: torch.dtype = getattr(torch, precision.compute)
        gradient: torch.dtype = getattr(torch, precision.gradient_type)
        for spec in specs:
            if spec.parameter.dtype != compute:
                raise ConfigError(
                    f"parameter '{spec.name}' is {spec.parameter.dtype}, but precision.compute is {precision.compute}; "
                    "build the model in that type"
                )
        self.entries = _lay_out(specs, grid)
        self.elements = sum(spec.parameter.numel() for spec in specs)
        self.parameters = torch.empty(self.elements, dtype=compute, device=device)
        self.gradients = torch.zeros(self.elements, dtype=gradient, device=device)
        shared = sum(spec.parameter.numel() * len(spec.shared_with) for spec in specs)
        self.shared_gradients = torch.zeros(shared, dtype=gradient, device=device)
        start = 0
        for entry in self.entries:
            _become_view(entry.spec.parameter, entry.view(self.parameters), entry.view(self.gradients))
            for other in entry.spec.shared_with:
                part = self.shared_gradients[start : start + other.numel()].view(other.shape)
                _become_view(other, entry.view(self.parameters), part)
                start += other.numel()

    def zero_gradients(self) -> None:
        """Before a batch."""
        self.gradients.zero_()
        self.shared_gradients.zero_()

    def add_shared_gradients(self) -> None:
        """Add to each parameter's gradient those of the parameters that share its memory, and forget these."""
        for entry in self.entries:
            for other in entry.spec.shared_with:
                assert other.grad is not None
                entry.view(self.gradients).add_(other.grad)
        self.shared_gradients.zero_()


LARGEST_BUCKET = 1 << 28
"""Elements that are updated at once at most."""


def cut(flat: FlatParameters, *, bsize: int, k: int | None, few: bool = False) -> list[ReductionChunk]:
    """Chunks of `k` buckets of `bsize` elements, in order; None makes one chunk of all that is reduced together.

    A chunk ends where the axes of the reduction change, so the last bucket of a chunk may be smaller. With `few` a
    chunk is one bucket, and what is not reduced one chunk: each costs a GPU some launches.
    """
    chunks = []
    for axes, group in groupby(flat.entries, key=lambda entry: entry.axes):
        entries = list(group)
        whole = slice(entries[0].where.start, entries[-1].where.stop)
        length = (whole.stop - whole.start) if k is None or (few and not axes) else k * bsize
        for part in pieces(whole, length):
            chunks.append(ReductionChunk(axes, part, tuple(pieces(part, LARGEST_BUCKET if few else bsize))))
    return chunks


def pieces(whole: slice, length: int) -> list[slice]:
    """Consecutive slices of `length` elements that make up `whole`; the last may be shorter."""
    return [slice(i, min(i + length, whole.stop)) for i in range(whole.start, whole.stop, max(length, 1))]


def replicas(flat: FlatParameters, grid: ProcessGrid) -> int:
    """The largest number of gradients that are summed into one."""
    return max((prod(grid.extent(axis) for axis in entry.axes) for entry in flat.entries), default=1)


def _lay_out(specs: Sequence[ParameterSpec], grid: ProcessGrid) -> tuple[FlatEntry, ...]:
    by_axes: dict[tuple[Axis, ...], list[ParameterSpec]] = {}
    for spec in specs:
        axes = tuple(axis for axis in spec.placement.partial if grid.extent(axis) > 1)
        by_axes.setdefault(axes, []).append(spec)
    entries = []
    start = 0
    for axes, group in by_axes.items():
        for spec in group:
            stop = start + spec.parameter.numel()
            entries.append(FlatEntry(spec, slice(start, stop), axes))
            start = stop
    return tuple(entries)


def _become_view(parameter: nn.Parameter, data: torch.Tensor, gradient: torch.Tensor) -> None:
    """Let `parameter`, the same object, lie in `data` and accumulate its gradient in `gradient`."""
    parameter.grad = None
    if parameter.is_meta:
        # `.data` cannot bring a tensor without storage to a device.
        there = nn.Parameter(data, requires_grad=parameter.requires_grad)
        torch.utils.swap_tensors(parameter, there)  # type: ignore[no-untyped-call]
    else:
        parameter.data = data
    if gradient.dtype != parameter.dtype:
        parameter.grad_dtype = gradient.dtype
    parameter.grad = gradient
