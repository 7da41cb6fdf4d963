"""One pipeline stage: the layers it owns, built and initialised, and where their parameters lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from axonn.inter_layer.partition import partition
from axonn.models.base import PipelineModel
from axonn.placement import Placement


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """A parameter, its full name ("layer.parameter") and its placement."""

    name: str
    parameter: nn.Parameter
    placement: Placement


class Stage(nn.Module):
    """The consecutive layers `span` of a model."""

    def __init__(
        self, model: PipelineModel, span: range, *, seed: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.span = span
        layers = model.layers
        # Built without storage first, so that torch's own random initialisation costs nothing.
        with torch.device("meta"):
            chain = {layers[i].name: layers[i].build().to(dtype) for i in span}
        self.chain = nn.ModuleDict(chain).to_empty(device=device)
        aliases = {second: first for first, second in model.ties}
        names = dict(self.chain.named_parameters())
        for name, parameter in names.items():
            model.initialise(aliases.get(name, name), parameter, seed=seed)
        for first, second in model.ties:
            if first in names and second in names:
                _set_parameter(self.chain, second, names[first])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.chain.values():
            x = layer(x)
        return x


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


def stage_spans(model: PipelineModel, stages: int) -> list[range]:
    """Layers of each stage, balanced by cost."""
    return partition([layer.cost for layer in model.layers], stages)


def parameter_specs(model: PipelineModel, stage: Stage, spans: list[range]) -> list[ParameterSpec]:
    """Every parameter of `stage` with its placement, in the order of the layers."""
    stage_of = {model.layers[i].name: s for s, span in enumerate(spans) for i in span}
    tied: dict[str, tuple[int, ...]] = {}
    for pair in model.ties:
        holders = tuple(sorted({stage_of[name.partition(".")[0]] for name in pair}))
        if len(holders) > 1:
            tied.update(dict.fromkeys(pair, holders))
    return [
        ParameterSpec(name=name, parameter=parameter, placement=Placement(tied_stages=tied.get(name, ())))
        for name, parameter in stage.chain.named_parameters()
    ]
