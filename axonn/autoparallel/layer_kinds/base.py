"""The interface of layer kinds: what must be known of a torch class for its modules to be cut."""

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
    """Feature dims of a layer's input and output and their sizes; None for an input without features.

    `names`: names of the sizes in the module's constructor.
    """

    input: int | None
    input_size: int
    output: int
    output_size: int
    names: tuple[str, str]


class Shapes(NamedTuple):
    """Shapes of a layer's input and output in the traced module."""

    input: Sequence[int]
    output: Sequence[int]


class Place(NamedTuple):
    """Place of a layer on the grid. `segments`: those of its input and output features, None where they are whole."""

    context: TensorContext
    layout: Layout
    segments: tuple[tuple[int, ...] | None, tuple[int, ...] | None]


class LayerKind(ABC, Generic[M]):
    """Rules to cut, build and predict modules of one torch class. A new kind is a file and a line in `KINDS`."""

    normalises: ClassVar[bool] = False
    """True for norms: input and output features are the same and are cut alike, without partner layers."""
    segmented: ClassVar[bool] = True
    """True if the features of a norm may be cut in several segments."""
    weight_dims: ClassVar[tuple[int, int]] = (0, 1)
    """Dims of the weight that are output and input features."""

    def refusal(self, module: M) -> str:
        """Return why this module stays whole; empty if it can be cut."""
        return ""

    @abstractmethod
    def features(self, module: M, shapes: Shapes) -> Features:
        """Return the features of its activations, which can be cut."""

    @abstractmethod
    def labels(self, module: M, dims: int) -> tuple[list[Label], list[Label]]:
        """Return labels of the `dims` dims of its input and of those of its output.

        Dims along which the layer works independently have the same label; dims that it mixes have None.
        """

    @abstractmethod
    def build(self, module: M, place: Place, like: dict[str, Any]) -> nn.Module:
        """Return the layer on this rank, its parameters uninitialised. `like`: their dtype and device."""

    @abstractmethod
    def cost(
        self,
        module: M,
        shapes: Shapes,
        *,
        rows: int,
        axes: tuple[TensorAxis | None, TensorAxis | None],
        segments: tuple[int, ...] | None,
        gradient: bool,
    ) -> LayerCost:
        """Return its cost for the performance model.

        `rows`: rows of the example; `axes`: axes along which its input and output features are cut, the latter in
        `segments`; `gradient`: True if its input needs a gradient.
        """


def mixing(dims: int, mixed: int) -> tuple[list[Label], list[Label]]:
    """Return input and output labels of a layer that mixes the last `mixed` of `dims` dims and no others."""
    labels: list[Label] = [dim if dim < dims - mixed else None for dim in range(dims)]
    return labels, labels
