"""One pipeline stage: its chunks of layers, built, and where their parameters lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from axonn.errors import ConfigError
from axonn.inter_layer.batch_shard import Tensors
from axonn.inter_layer.partition import partition_chunks
from axonn.models.base import Layer, PipelineModel
from axonn.models.initialization import fill
from axonn.placement import Placement
from axonn.schedules import ChunkLayout
from axonn.tensor import TensorContext, placements


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """A parameter, its full name ("layer.parameter") and its placement.

    A tied parameter is called by the first name of its tie wherever it lies. `shared_with`: other parameters of this
    stage that are the same one (a head tied to an embedding, where both lie here). They use its memory, but each has a
    gradient of its own, which is added to the parameter's at the end of a batch: in the order in which stages add
    theirs, where the two lie apart.
    """

    name: str
    parameter: nn.Parameter
    placement: Placement
    shared_with: tuple[nn.Parameter, ...] = ()


class StageChunk(nn.Module):
    """A rank's part of the consecutive layers `span` of a model, their parameters allocated but not initialised.

    `recompute`: keep only the input of every so many blocks for the backward, and recompute what is inside.
    """

    def __init__(
        self,
        model: PipelineModel,
        span: range,
        *,
        context: TensorContext,
        dtype: torch.dtype,
        device: torch.device,
        recompute: int | None = None,
    ) -> None:
        super().__init__()
        self.span = span
        layers = model.layers
        # Built without storage first, so that torch's own random initialisation costs nothing.
        with torch.device("meta"):
            chain = nn.ModuleDict({layers[i].name: layers[i].build(context).to(dtype) for i in span})
        buffers = [name for name, _ in chain.named_buffers()]
        if buffers:
            raise ConfigError(
                f"the layers have buffers ({buffers[0]}, ...), which no stage would initialise; compute them in forward"
            )
        self.chain = chain.to_empty(device=device)
        self.context = context
        self.placements = placements(self.chain)
        self._segments = segments([layers[i] for i in span], recompute)

    def forward(self, *tensors: torch.Tensor) -> Tensors:
        modules = list(self.chain.values())
        for first, stop, recomputed in self._segments:
            part = modules[first:stop]
            if recomputed and torch.is_grad_enabled():
                # All randomness is counter-based: there is no generator state to keep.
                tensors = checkpoint(_run, part, *tensors, use_reentrant=False, preserve_rng_state=False)
            else:
                tensors = _run(part, *tensors)
        return tensors


def _run(modules: Sequence[nn.Module], *tensors: torch.Tensor) -> Tensors:
    for module in modules:
        out = module(*tensors)
        tensors = out if isinstance(out, tuple) else (out,)
    return tensors


def segments(layers: Sequence[Layer], recompute: int | None) -> list[tuple[int, int, bool]]:
    """(first, stop, recomputed) of consecutive layers: every `recompute` blocks together, what is in no block kept."""
    if recompute is None:
        return [(0, len(layers), False)]
    found: list[tuple[int, int, bool]] = []
    blocks: list[int] = []
    for i, layer in enumerate(layers):
        inside = layer.block is not None
        if layer.block is not None and layer.block not in blocks:
            blocks.append(layer.block)
        begins = inside and (len(blocks) > recompute or not (found and found[-1][2]))
        if not found or begins or inside != found[-1][2]:
            blocks = [layer.block] if layer.block is not None else []
            found.append((i, i + 1, inside))
        else:
            found[-1] = (found[-1][0], i + 1, inside)
    return found


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


def virtual_spans(model: PipelineModel, layout: ChunkLayout) -> list[range]:
    """Layers of each virtual stage, such that the stages are balanced by cost."""
    return partition_chunks([layer.cost for layer in model.layers], layout)


def initialise(model: PipelineModel, chunk: StageChunk, *, seed: int) -> None:
    """Fill the parameters of a chunk that stands by itself, and make one of two that are tied: autograd adds up its
    gradients."""
    aliases = {second: first for first, second in model.ties}
    names = dict(chunk.chain.named_parameters())
    for first, second in model.ties:
        if first in names and second in names:
            _set_parameter(chunk.chain, second, names[first])
    grid, here = chunk.context.grid, chunk.context.here
    for own, parameter in chunk.chain.named_parameters():
        name = aliases.get(own, own)
        placement = chunk.placements[own]
        fill(parameter, model.initial(name), name=name, seed=seed, placement=placement, grid=grid, here=here)


def tied_stages(model: PipelineModel, spans: Sequence[range], layout: ChunkLayout) -> dict[str, tuple[int, ...]]:
    """The stages that hold each tied parameter, of those that lie on several stages."""
    stage_of = {model.layers[i].name: layout.place(v)[0] for v, span in enumerate(spans) for i in span}
    holders: dict[str, set[int]] = {}
    for first, second in model.ties:
        holders.setdefault(first, set()).update(stage_of[name.partition(".")[0]] for name in (first, second))
    return {name: tuple(sorted(stages)) for name, stages in holders.items() if len(stages) > 1}


def parameter_specs(
    model: PipelineModel, chunks: Sequence[StageChunk], spans: Sequence[range], layout: ChunkLayout
) -> list[ParameterSpec]:
    """Every parameter of a stage's `chunks` with its placement, in the order of the layers."""
    aliases = {second: first for first, second in model.ties}
    tied = tied_stages(model, spans, layout)
    found: dict[str, list[nn.Parameter]] = {}
    placed: dict[str, Placement] = {}
    for chunk in sorted(chunks, key=lambda c: c.span.start):
        for own, parameter in chunk.chain.named_parameters():
            name = aliases.get(own, own)
            found.setdefault(name, []).append(parameter)
            placed.setdefault(name, chunk.placements[own])
    specs = []
    for name, (parameter, *others) in found.items():
        placement = replace(placed[name], tied_stages=tied.get(name, ()))
        specs.append(ParameterSpec(name=name, parameter=parameter, placement=placement, shared_with=tuple(others)))
    return specs
