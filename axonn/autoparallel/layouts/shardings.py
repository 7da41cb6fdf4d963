"""How an activation is cut, and what becomes of the cut when the activation is reshaped."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from axonn.tensor.context import TensorAxis

Shape = tuple[int, ...]


class Form(NamedTuple):
    """Dim `dim` is cut; it consists of `segments` (their whole lengths), each cut by itself into equal parts."""

    dim: int
    segments: tuple[int, ...]

    def divides(self, extent: int) -> bool:
        """Whether each segment can be cut into `extent` parts."""
        return all(segment % extent == 0 for segment in self.segments)


class Shard(NamedTuple):
    """Cut along `axis` in this form, and repeated along the other tensor axis."""

    axis: TensorAxis
    form: Form

    def __str__(self) -> str:
        segments = "" if len(self.form.segments) == 1 else f" in segments {brief(self.form.segments)}"
        return f"dim {self.form.dim} along {self.axis}{segments}"


class Repeated(NamedTuple):
    """Whole on every rank, for something that is cut along `axis`, so that the gradients of the ranks add up."""

    axis: TensorAxis

    def __str__(self) -> str:
        return f"whole, gradient summed along {self.axis}"


State = Shard | None
"""How a value lies; None is whole on every rank."""
Wanted = Shard | Repeated | None
"""How an operation wants a value."""


class ShardingRule(NamedTuple):
    """One way in which an operation carries a cut: the forms of its inputs (None is whole) and that of its output."""

    inputs: tuple[Form | None, ...]
    output: Form


def describe(state: Wanted) -> str:
    """In words."""
    return "whole" if state is None else str(state)


def reshaped(form: Form, source: Shape, target: Shape) -> Form | None:
    """The form in `target` of what has `form` in `source`, both in row-major order; None where it is no cut of one dim.

    A cut of a dim is a list of segments of the flattened dims around it. Dims of both shapes that hold the same
    elements are compared: the innermost dim of the target that is cut in such segments is the answer.
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
    """A form for each dim of `target` that is one of several that a dim of `source` is split into."""
    found = []
    for dim, size in enumerate(target):
        group = _group_of(dim, target, source)
        if group is not None and size > 1 and sum(target[d] > 1 for d in group[0]) > 1:
            found.append(Form(dim, (size,)))
    return found


def _group_of(dim: int, source: Shape, target: Shape) -> tuple[range, range] | None:
    """The smallest runs of consecutive dims of both that hold the same elements, the first one with `dim`."""
    if prod(source) != prod(target) or not prod(source):
        return None
    i = j = 0
    while i < len(source):
        first, second = i, j
        here, there = source[i], target[j] if j < len(target) else 1
        i, j = i + 1, min(j + 1, len(target))
        while here != there:
            if here < there:
                here *= source[i]
                i += 1
            else:
                there *= target[j]
                j += 1
        if dim < i:
            return range(first, i), range(second, j)
    return None


def concatenated(forms: Sequence[Form]) -> Form:
    """That of tensors that are concatenated in the dim in which each is cut."""
    return Form(forms[0].dim, tuple(segment for form in forms for segment in form.segments))


def pieces(form: Form, sizes: Sequence[int]) -> list[Form] | None:
    """Those of the consecutive pieces of these sizes; None where a segment crosses a border."""
    segments = list(form.segments)
    found = []
    for size in sizes:
        piece: list[int] = []
        while segments and sum(piece) + segments[0] <= size:
            piece.append(segments.pop(0))
        if sum(piece) != size:
            return None
        found.append(Form(form.dim, tuple(piece)))
    return found


def brief(segments: tuple[int, ...]) -> str:
    """Lengths of segments in words."""
    if len(segments) > 4 and len(set(segments)) == 1:
        return f"{len(segments)} x {segments[0]}"
    return " + ".join(map(str, segments))
