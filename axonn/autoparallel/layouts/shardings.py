"""Shardings of activations: how one is cut, and how reshaping changes the cut."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from axonn.tensor.context import TensorAxis

Shape = tuple[int, ...]


class Form(NamedTuple):
    """Form of a cut, without its axis: dim `dim` consists of `segments` (whole lengths), each cut into equal parts."""

    dim: int
    segments: tuple[int, ...]

    def divides(self, extent: int) -> bool:
        """Return True if each segment can be cut into `extent` parts."""
        return all(segment % extent == 0 for segment in self.segments)


class Shard(NamedTuple):
    """Layout of a value that is cut along `axis` in this form, and repeated along the other tensor axis."""

    axis: TensorAxis
    form: Form

    def __str__(self) -> str:
        segments = "" if len(self.form.segments) == 1 else f" in segments {brief(self.form.segments)}"
        return f"dim {self.form.dim} along {self.axis}{segments}"


class Repeated(NamedTuple):
    """Layout of a value that is whole on every rank but used by shards along `axis`: its gradient is summed there."""

    axis: TensorAxis

    def __str__(self) -> str:
        return f"whole, gradient summed along {self.axis}"


State = Shard | None
"""Layout of a value; None is whole on every rank."""
Wanted = Shard | Repeated | None
"""Layout in which an operation wants a value."""


class ShardingRule(NamedTuple):
    """Rule by which an operation carries a cut: the forms of its inputs (None is whole) and of its output."""

    inputs: tuple[Form | None, ...]
    output: Form


def describe(state: Wanted) -> str:
    """Return a layout as text, for instance "dim 1 along row"."""
    return "whole" if state is None else str(state)


def reshaped(form: Form, source: Shape, target: Shape) -> Form | None:
    """Return the form after a reshape from shape `source`, in which it is `form`, to `target`; None if there is none.

    A cut of a dim is a list of segments of the flattened dims around it. Dims of both shapes that hold the same
    elements are compared: the result is the innermost dim of the target that is cut in the same segments.
    """
    group = _group_of(form.dim, source, target)
    if group is None:
        return None
    sources, targets = group
    outer = prod(source[sources.start : form.dim])
    inner = prod(source[form.dim + 1 : sources.stop])
    flat = [segment * inner for segment in form.segments] * outer
    for dim in reversed(targets):
        if target[dim] == 1:
            continue
        outer = prod(target[targets.start : dim])
        inner = prod(target[dim + 1 : targets.stop])
        if len(flat) % outer:
            continue
        pattern = flat[: len(flat) // outer]
        if pattern * outer == flat and all(length % inner == 0 for length in pattern):
            return Form(dim, tuple(length // inner for length in pattern))
    return None


def splits(source: Shape, target: Shape) -> list[Form]:
    """Return a form for each dim of `target` that is one of several into which a dim of `source` is split."""
    forms = []
    for dim, size in enumerate(target):
        group = _group_of(dim, target, source)
        if group is not None and size > 1 and sum(target[d] > 1 for d in group[0]) > 1:
            forms.append(Form(dim, (size,)))
    return forms


def _group_of(dim: int, source: Shape, target: Shape) -> tuple[range, range] | None:
    """Return the smallest runs of dims of `source` (with `dim`) and of `target` that hold the same elements."""
    if prod(source) != prod(target) or not prod(source):
        return None
    i = j = 0
    while i < len(source):
        source_start, target_start = i, j
        source_size, target_size = source[i], target[j] if j < len(target) else 1
        i, j = i + 1, min(j + 1, len(target))
        while source_size != target_size:
            if source_size < target_size:
                source_size *= source[i]
                i += 1
            else:
                target_size *= target[j]
                j += 1
        if dim < i:
            return range(source_start, i), range(target_start, j)
    return None


def concatenated(forms: Sequence[Form]) -> Form:
    """Return the form of tensors concatenated in the dim in which each is cut."""
    return Form(forms[0].dim, tuple(segment for form in forms for segment in form.segments))


def pieces(form: Form, sizes: Sequence[int]) -> list[Form] | None:
    """Return the forms of consecutive pieces of these sizes; None if a segment crosses a border."""
    segments = list(form.segments)
    forms = []
    for size in sizes:
        piece: list[int] = []
        while segments and sum(piece) + segments[0] <= size:
            piece.append(segments.pop(0))
        if sum(piece) != size:
            return None
        forms.append(Form(form.dim, tuple(piece)))
    return forms


def brief(segments: tuple[int, ...]) -> str:
    """Return segment lengths as text: "6 x 4", or "4 + 8"."""
    if len(segments) > 4 and len(set(segments)) == 1:
        return f"{len(segments)} x {segments[0]}"
    return " + ".join(map(str, segments))
