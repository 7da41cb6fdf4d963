"""Base of all tensor-parallel layers: their layout, and the placement of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from axonn.grid import Axis
from axonn.placement import Cut, Placement
from axonn.tensor.context import TensorAxis, TensorContext
from axonn.tensor.gradient_accumulation import WeightGradients


class Layout(NamedTuple):
    """Axes along which a layer's input features and output features are cut; None where they are whole.

    Along the other tensor axis activations are repeated.
    """

    input: TensorAxis | None
    output: TensorAxis | None


NORMAL = Layout("row", "col")
TRANSPOSED = Layout("col", "row")


class TensorLayer(nn.Module):
    """A layer that declares the placement of its own parameters (not those of its children) on the grid.

    Its parameters are allocated but not initialised (see `axonn.models.initialization`). `weight_gradients`: queue by
    which the weight gradients are accumulated in place, and possibly deferred; None leaves them to autograd.
    """

    def __init__(self, context: TensorContext) -> None:
        super().__init__()
        self.context = context
        self.placements: dict[str, Placement] = {}
        self.weight_gradients: WeightGradients | None = None

    def place(
        self, name: str, shape: Sequence[int], *cuts: Cut | None, device: torch.device | None, dtype: torch.dtype | None
    ) -> nn.Parameter:
        """Allocate this rank's shard of the parameter `name` of whole `shape`. Cuts along one rank are dropped."""
        kept = tuple(cut for cut in cuts if cut is not None and self.context.extent(_tensor_axis(cut.axis)) > 1)
        placement = Placement(shape=tuple(shape), cuts=kept)
        parameter = nn.Parameter(torch.empty(placement.local_shape(self.context.grid), device=device, dtype=dtype))
        self.register_parameter(name, parameter)
        self.placements[name] = placement
        return parameter


def _tensor_axis(axis: Axis) -> TensorAxis:
    assert axis in ("row", "col"), f"layers are cut along row and col, not {axis}"
    return axis


def check_layout(layout: Layout, label: str) -> None:
    """Raise `ValueError` for a layout of the layer `label` that cuts both features along one axis."""
    if layout.input is not None and layout.input == layout.output:
        raise ValueError(
            f"layout of {label}: input and output both lie along {layout.input}; a rank would hold only the weights "
            "between its own features; let one lie along the other axis or be None"
        )


def cut(dim: int, axis: TensorAxis | None, segments: Sequence[int]) -> Cut | None:
    """Return the cut of a dim made of `segments` along `axis`; None without an axis."""
    return None if axis is None else Cut(dim, axis, tuple(segments))


def placements(module: nn.Module) -> dict[str, Placement]:
    """Return the placement of every parameter of `module` by its name.

    Parameters of ordinary layers are replicated along row and col. A shared parameter has several names, and under each
    the placement of the first layer that holds it.
    """
    placed: dict[int, Placement] = {}
    for submodule in module.modules():
        if isinstance(submodule, TensorLayer):
            for name, placement in submodule.placements.items():
                placed.setdefault(id(getattr(submodule, name)), placement)
    return {
        name: placed.get(id(parameter), Placement(shape=tuple(parameter.shape)))
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def segments_of(
    size: int, segments: Sequence[int] | None, context: TensorContext, axis: TensorAxis | None, label: str
) -> tuple[int, ...]:
    """Return the `segments` of a dim of `size`, by default one, checked against the grid.

    Raises `GridError` when one is not divisible and `ValueError` when they do not add up; `label` names the dim.
    """
    lengths = (size,) if segments is None else tuple(segments)
    if sum(lengths) != size:
        raise ValueError(f"{label}: segments {lengths} do not add up to {size}")
    for segment in lengths:
        context.part(segment, axis, label)
    return lengths
