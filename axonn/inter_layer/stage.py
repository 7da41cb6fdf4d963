"""One pipeline stage: its chunks of layers, built, and the placements of their parameters."""

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

    A tied parameter has the first name of its tie on every stage. `shared_with`: parameters of this stage that are the
    same one (a head tied to an embedding, if both are on this stage). They share its memory, but each has a gradient of
    its own, which is added to the parameter's at the end of a batch, in the same order as if the two were on different
    stages.
    """

    name: str
    parameter: nn.Parameter
    placement: Placement
    shared_with: tuple[nn.Parameter, ...] = ()


class StageChunk(nn.Module):
    """A rank's shard of the consecutive layers `span` of a model, with uninitialised parameters.

    `recompute`: activation checkpointing; keep only the input of every `recompute` blocks, and recompute the rest in
    the backward. Raises `ConfigError` for layers with buffers.
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
            segment = modules[first:stop]
            if recomputed and torch.is_grad_enabled():
                # All randomness is counter-based: there is no generator state to keep.
                tensors = checkpoint(_run, segment, *tensors, use_reentrant=False, preserve_rng_state=False)
            else:
                tensors = _run(segment, *tensors)
        return tensors


def _run(modules: Sequence[nn.Module], *tensors: torch.Tensor) -> Tensors:
    for module in modules:
        out = module(*tensors)
        tensors = out if isinstance(out, tuple) else (out,)
    return tensors


def segments(layers: Sequence[Layer], recompute: int | None) -> list[tuple[int, int, bool]]:
    """Return runs of layers as (first, stop, recomputed): `recompute` blocks each; layers outside blocks are kept."""
    if recompute is None:
        return [(0, len(layers), False)]
    runs: list[tuple[int, int, bool]] = []
    blocks: list[int] = []
    for i, layer in enumerate(layers):
        inside = layer.block is not None
        if layer.block is not None and layer.block not in blocks:
            blocks.append(layer.block)
        begins = inside and (len(blocks) > recompute or not (runs and runs[-1][2]))
        if not runs or begins or inside != runs[-1][2]:
            blocks = [layer.block] if layer.block is not None else []
            runs.append((i, i + 1, inside))
        else:
            runs[-1] = (runs[-1][0], i + 1, inside)
    return runs


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


def virtual_spans(model: PipelineModel, layout: ChunkLayout) -> list[range]:
    """Return the layers of each virtual stage, such that the stages are balanced by cost."""
    return partition_chunks([layer.cost for layer in model.layers], layout)


def initialise(model: PipelineModel, chunk: StageChunk, *, seed: int) -> None:
    """Initialise the parameters of a chunk used without an engine.

    Tied parameters become one object, whose gradients autograd adds up.
    """
    aliases = {second: first for first, second in model.ties}
    names = dict(chunk.chain.named_parameters())
    for first, second in model.ties:
        if first in names and second in names:
            _set_parameter(chunk.chain, second, names[first])
    grid, coordinates = chunk.context.grid, chunk.context.coordinates
    for alias, parameter in chunk.chain.named_parameters():
        name = aliases.get(alias, alias)
        placement = chunk.placements[alias]
        initial = model.initial(name)
        fill(parameter, initial, name=name, seed=seed, placement=placement, grid=grid, coordinates=coordinates)


def tied_stages(model: PipelineModel, spans: Sequence[range], layout: ChunkLayout) -> dict[str, tuple[int, ...]]:
    """Return the stages that hold each tied parameter, for parameters that are on several stages."""
    stage_of = {model.layers[i].name: layout.place(v)[0] for v, span in enumerate(spans) for i in span}
    holders: dict[str, set[int]] = {}
    for first, second in model.ties:
        holders.setdefault(first, set()).update(stage_of[name.partition(".")[0]] for name in (first, second))
    return {name: tuple(sorted(stages)) for name, stages in holders.items() if len(stages) > 1}


def parameter_specs(
    model: PipelineModel, chunks: Sequence[StageChunk], spans: Sequence[range], layout: ChunkLayout
) -> list[ParameterSpec]:
    """Return every parameter of a stage's `chunks` with its placement, in the order of the layers."""
    aliases = {second: first for first, second in model.ties}
    tied = tied_stages(model, spans, layout)
    parameters: dict[str, list[nn.Parameter]] = {}
    placed: dict[str, Placement] = {}
    for chunk in sorted(chunks, key=lambda c: c.span.start):
        for alias, parameter in chunk.chain.named_parameters():
            name = aliases.get(alias, alias)
            parameters.setdefault(name, []).append(parameter)
            placed.setdefault(name, chunk.placements[alias])
    specs = []
    for name, (parameter, *others) in parameters.items():
        placement = replace(placed[name], tied_stages=tied.get(name, ()))
        specs.append(ParameterSpec(name=name, parameter=parameter, placement=placement, shared_with=tuple(others)))
    return specs
