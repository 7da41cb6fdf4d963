"""What has to be known of a class of torch for its modules to be cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from torch import nn

from axonn.autoparallel.layouts.op_rules import Label
from axonn.perf.layers.layer_cost import LayerCost
from axonn.tensor.context import TensorAxis, TensorContext
from axonn.tensor.layers.layer import Layout

M = TypeVar("M", bound=nn.Module)


class Features(NamedTuple):
    """The dims of a layer's activations that are features, and their sizes; None where there are none to cut.

    `names` are those of the module's own arguments.
    """

    input: int | None
    input_size: int
    output: int
    output_size: int
    names: tuple[str, str]


class Shapes(NamedTuple):
    """What a layer reads and makes in the traced module."""

    input: Sequence[int]
    output: Sequence[int]


class Place(NamedTuple):
    """Where a layer was put. `segments` of its input and output features, None where they are whole."""

    context: TensorContext
    layout: Layout
    segments: tuple[tuple[int, ...] | None, tuple[int, ...] | None]


class LayerKind(ABC, Generic[M]):
    """How modules of one class of torch are cut, built and predicted. A new one is a file and a line in `KINDS`."""

    normalises: ClassVar[bool] = False
    """Whether its input and output features are the same ones, cut alike and by themselves (a norm)."""
    segmented: ClassVar[bool] = True
    """Of what normalises: whether features may be cut in several segments."""
    weight_dims: ClassVar[tuple[int, int]] = (0, 1)
    """The dims of its weight that are output and input features."""

    def refusal(self, module: M) -> str:
        """Why this module stays whole; empty when it can be cut."""
        return ""

    @abstractmethod
    def features(self, module: M, shapes: Shapes) -> Features:
        """What of its activations can be cut."""

    @abstractmethod
    def alike(self, module: M, dims: int) -> tuple[list[Label], list[Label]]:
        """Labels of the dims of its input, which has so many, and of its output: the same one where it treats all
        places alike, None where it mixes them."""

    @abstractmethod
    def build(self, module: M, place: Place, like: dict[str, Any]) -> nn.Module:
        """The layer on this rank, its parameters still empty. `like`: their dtype and device."""

    @abstractmethod
    def part(
        self,
        module: M,
        shapes: Shapes,
        *,
        rows: int,
        axes: tuple[TensorAxis | None, TensorAxis | None],
        segments: tuple[int, ...] | None,
        gradient: bool,
    ) -> LayerCost:
        """What it is for the performance model. `rows`: of the example; `axes`: along which its input and output
        features are cut, the latter in `segments`; `gradient`: whether its input needs one."""


def mixing(dims: int, mixed: int) -> tuple[list[Label], list[Label]]:
    """Labels of what mixes the last dims, so many, and no others."""
    labels: list[Label] = [dim if dim < dims - mixed else None for dim in range(dims)]
    return labels, labels
