"""Overdecomposition of a module whose rows are independent: sub-shards take turns, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from axonn.errors import ConfigError
from axonn.inter_layer.batch_shard import cut_rows
from axonn.tensor.context import Position, TensorContext


def run_in_sub_shards(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    with_rows: frozenset[str],
    count: int,
    context: TensorContext,
) -> Any:
    """Return the outputs of `module` for `inputs`, computed in `count` sub-shards.

    Inputs in `with_rows` are cut in dim 0, where the outputs have the rows too. Autograd sees one function of the
    inputs. Its backward runs that of each sub-shard in a lane, which adds to the gradients of the parameters; it can
    run only once. Raises `ConfigError` when there are fewer rows than sub-shards or inputs differ in their rows.
    """
    rows = {name: inputs[name].shape[0] for name in inputs if name in with_rows}
    number = next(iter(rows.values()))
    if len(set(rows.values())) > 1:
        raise ConfigError(f"the inputs have different numbers of rows: {rows}")
    if number < count:
        raise ConfigError(f"{number} rows cannot be cut into overdecomposition = {count} sub-shards; lower one of them")
    shards = _SubShards(module, [name in with_rows for name in inputs], cut_rows(number, count), context)
    tensors = list(inputs.values())
    if torch.is_grad_enabled():
        # Autograd needs an input that requires a gradient; perhaps none of the module's does.
        anchor = torch.empty(0, requires_grad=True)
        outputs = _Function.apply(shards, anchor, *tensors)  # type: ignore[no-untyped-call]
    else:
        outputs = _joined(shards.forward(shards.cut(tensors)))
    assert shards.structure is not None
    return pytree.tree_unflatten(list(outputs), shards.structure)


class _SubShards:
    """Sub-shards of one forward and its backward. `structure`: the nesting of the module's outputs."""

    def __init__(
        self, module: nn.Module, with_rows: Sequence[bool], rows: Sequence[range], context: TensorContext
    ) -> None:
        self.with_rows = with_rows
        self.structure: pytree.TreeSpec | None = None
        self._module = module
        self._rows = rows
        self._context = context
        self._position = _position(context)

    def cut(self, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Return the inputs of each sub-shard."""
        return [
            [t[rows.start : rows.stop] if cut else t for t, cut in zip(tensors, self.with_rows, strict=True)]
            for rows in self._rows
        ]

    def forward(self, parts: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Run the forward; return the outputs of each sub-shard."""
        return self._context.lanes.run([partial(self._forward, lane, part) for lane, part in enumerate(parts)])

    def backward(
        self, outputs: Sequence[Sequence[GradientEdge | None]], gradients: Sequence[torch.Tensor | None]
    ) -> None:
        """Run the backward, which adds to the gradients of the parameters and of the sub-shards' inputs."""
        lanes = range(len(self._rows))
        self._context.lanes.run([partial(self._backward, lane, outputs[lane], gradients) for lane in lanes])

    def _forward(self, lane: int, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with self._at(lane):
            outputs, self.structure = pytree.tree_flatten(self._module(*inputs))
        return outputs

    def _backward(
        self, lane: int, outputs: Sequence[GradientEdge | None], gradients: Sequence[torch.Tensor | None]
    ) -> None:
        rows = self._rows[lane]
        pairs = [
            (output, gradient[rows.start : rows.stop])
            for output, gradient in zip(outputs, gradients, strict=True)
            if output is not None and gradient is not None
        ]
        # On any device in this thread, since it is the one whose turn it is.
        with self._at(lane), torch.autograd.set_multithreading_enabled(False):
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])

    def _at(self, lane: int) -> AbstractContextManager[None]:
        if self._position is None:
            return nullcontext()
        step, samples = self._position
        rows = self._rows[lane]
        return self._context.positions.at(step, samples[rows.start : rows.stop])


class _Function(torch.autograd.Function):
    """Autograd function of all sub-shards, whose own graphs are inside it."""

    @staticmethod
    def forward(ctx: Any, shards: _SubShards, anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        needed = ctx.needs_input_grad[2:]
        parts = [
            [t.detach().requires_grad_(need) for t, need in zip(part, needed, strict=True)]
            for part in shards.cut(tensors)
        ]
        with torch.enable_grad():
            outputs = shards.forward(parts)
        ctx.shards = shards
        ctx.graph = parts, [[get_gradient_edge(t) if t.requires_grad else None for t in output] for output in outputs]
        ctx.set_materialize_grads(False)
        joined = _joined([[t.detach() for t in output] for output in outputs])
        constant = [joint for joint, part in zip(joined, outputs[0], strict=True) if not part.requires_grad]
        ctx.mark_non_differentiable(*constant)
        return tuple(joined)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if ctx.graph is None:
            raise RuntimeError("the backward of sub-shards has run already; do without retain_graph")
        parts, outputs = ctx.graph
        ctx.graph = None
        ctx.shards.backward(outputs, gradients)
        input_gradients = []
        for tensors, cut in zip(zip(*parts, strict=True), ctx.shards.with_rows, strict=True):
            input_gradients.append(_gradient(tensors, cut))
        return None, None, *input_gradients


def _gradient(parts: Sequence[torch.Tensor], cut: bool) -> torch.Tensor | None:
    """Return the gradient of an input: concatenated if it was `cut`, else the sum over the sub-shards."""
    if all(part.grad is None for part in parts):
        return None
    gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
    return torch.cat(gradients) if cut else torch.stack(gradients).sum(0)


def _joined(parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def _position(context: TensorContext) -> Position | None:
    """Return the caller's position in training, if set: the lanes' threads do not have it."""
    try:
        return context.positions.now
    except ConfigError:
        return None
