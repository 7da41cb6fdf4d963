"""Forward and backward of microbatches through one chunk, each cut into sub-shards that run in lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from axonn.inter_layer.activation_memory import SavedBytes
from axonn.inter_layer.batch_shard import Batch, Tensors, cut_rows
from axonn.inter_layer.stage import StageChunk
from axonn.models.base import PipelineModel
from axonn.schedules import Direction
from axonn.tensor.gradient_accumulation import WeightGradients
from axonn.tensor.in_place import accumulate_in_place


class ChunkCompute:
    """A chunk with the tensors it holds for each microbatch, by sub-shard.

    `source`: it is the first chunk of the network; `sink`: it is the last, so the loss is computed here.
    """

    def __init__(
        self,
        module: StageChunk,
        *,
        model: PipelineModel,
        microbatch_size: int,
        sub_shards: int,
        source: bool,
        sink: bool,
    ) -> None:
        self.module = module
        self.source = source
        self.sink = sink
        self._model = model
        self._context = module.context
        self._rows = microbatch_size
        self._sub_shards = cut_rows(microbatch_size, sub_shards)
        self._queue = WeightGradients()
        accumulate_in_place(module, self._queue)
        self._inputs: dict[int, list[Tensors]] = {}
        self._outputs: dict[int, list[list[GradientEdge | None]]] = {}
        """Gradient edge of each floating-point output; None if it depends on no parameter and no input."""
        self._gradients: dict[int, list[Tensors]] = {}
        self._weights: dict[int, Callable[[], None]] = {}
        """Weight halves of split backwards."""
        self.saved_bytes: int | None = None
        """Bytes that one microbatch keeps from its forward to its backward; None before the first forward."""

    @property
    def held(self) -> set[int]:
        """Microbatches with tensors held."""
        return set().union(self._inputs, self._outputs, self._gradients, self._weights)

    def put(self, direction: Direction, microbatch: int, tensors: Tensors) -> None:
        """Store the received activations or gradients of a microbatch."""
        parts = [tuple(t[rows.start : rows.stop] for t in tensors) for rows in self._sub_shards]
        if direction == Direction.FORWARD:
            for part in parts:
                for tensor in part:
                    tensor.requires_grad_(tensor.dtype.is_floating_point)
            self._inputs[microbatch] = parts
        else:
            self._gradients[microbatch] = parts

    def forward(self, microbatch: int, batch: Batch) -> Tensors:
        """Run the forward of a microbatch; return the activations to pass on, none from the last chunk."""
        saved = SavedBytes(without=self.module.parameters()) if self.saved_bytes is None else None
        outputs = self._context.lanes.run(
            [partial(self._forward, microbatch, lane, batch, saved) for lane in range(len(self._sub_shards))]
        )
        if saved is not None:
            self.saved_bytes = saved.bytes
        # The graph is kept; the outputs themselves live only as long as their message is under way.
        self._outputs[microbatch] = [
            [get_gradient_edge(t) if t.requires_grad else None for t in output if t.dtype.is_floating_point]
            for output in outputs
        ]
        return () if self.sink else _joined([tuple(t.detach() for t in output) for output in outputs])

    @torch.no_grad()
    def evaluate(self, microbatch: int, batch: Batch) -> Tensors:
        """Run the forward in evaluation mode (no dropout), keeping nothing; return the same as `forward`."""
        lanes = range(len(self._sub_shards))
        with _evaluating(self.module):
            outputs = self._context.lanes.run([partial(self._forward, microbatch, lane, batch, None) for lane in lanes])
        self._inputs.pop(microbatch, None)
        return () if self.sink else _joined(outputs)

    def backward(self, microbatch: int, batch: Batch, *, loss_scale: float) -> Tensors:
        """Run the backward of a microbatch; return the gradients to pass on, none from the first chunk."""
        outputs = self._outputs.pop(microbatch)
        gradients = self._gradients.pop(microbatch, None)

        def backward(lane: int) -> None:
            self._context.begin_sub_shard()
            if gradients is None:
                grad_outputs: Tensors = (torch.full_like(batch.losses[microbatch], loss_scale * self._share(lane)),)
            else:
                grad_outputs = gradients[lane]
            pairs = [(edge, g) for edge, g in zip(outputs[lane], grad_outputs, strict=True) if edge is not None]
            with self._context.positions.at(batch.step, batch.samples(self._global_rows(microbatch, lane))):
                torch.autograd.backward([edge for edge, _ in pairs], [g for _, g in pairs])

        self._context.lanes.run([partial(backward, lane) for lane in range(len(outputs))])
        if self.source:
            return ()
        inputs = self._inputs.pop(microbatch)
        return _joined([_gradients(part) for part in inputs])

    def backward_input(self, microbatch: int, batch: Batch, *, loss_scale: float) -> Tensors:
        """Run the backward but for the weight gradients, which are left to `backward_weight`."""
        self._queue.deferring = True
        gradients = self.backward(microbatch, batch, loss_scale=loss_scale)
        self._queue.deferring = False
        self._weights[microbatch] = self._queue.take()
        return gradients

    def backward_weight(self, microbatch: int) -> None:
        """Accumulate the weight gradients that `backward_input` of this microbatch left."""
        self._weights.pop(microbatch)()

    def _forward(self, microbatch: int, lane: int, batch: Batch, saved: SavedBytes | None) -> Tensors:
        self._context.begin_sub_shard()
        rows = self._global_rows(microbatch, lane)
        x = batch.inputs(rows) if self.source else self._inputs[microbatch][lane]
        with self._context.positions.at(batch.step, batch.samples(rows)):
            if saved is None:
                return self._outputs_of(x, microbatch, lane, batch)
            # The first forward of a chunk counts the bytes that each one keeps.
            for tensor in x:
                saved.add(tensor)
            with saved.counting():
                return self._outputs_of(x, microbatch, lane, batch)

    def _outputs_of(self, x: Tensors, microbatch: int, lane: int, batch: Batch) -> Tensors:
        output: Tensors = self.module(*x)
        if not self.sink:
            return output
        targets = batch.targets(self._global_rows(microbatch, lane))
        loss = self._model.loss(output[0] if len(output) == 1 else output, targets, self._context)
        batch.add_loss(microbatch, loss, self._share(lane))
        return (loss,)

    def _global_rows(self, microbatch: int, lane: int) -> range:
        """Return the rows of a sub-shard, numbered in the batch shard."""
        rows, first = self._sub_shards[lane], microbatch * self._rows
        return range(first + rows.start, first + rows.stop)

    def _share(self, lane: int) -> float:
        return len(self._sub_shards[lane]) / self._rows


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put all submodules of `module` into evaluation mode inside the block."""
    training = [submodule for submodule in module.modules() if submodule.training]
    for submodule in training:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def _gradients(inputs: Tensors) -> Tensors:
    return tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in inputs if t.requires_grad)


def _joined(parts: list[Tensors]) -> Tensors:
    """Concatenate the tensors of the sub-shards to those of the microbatch, contiguous."""
    if len(parts) == 1:
        return tuple(t.contiguous() for t in parts[0])
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
