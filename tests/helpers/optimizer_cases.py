"""A small model's optimizers, rank by rank, with gradients made up per step and replica; and torch's own, serially."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from axonn.checkpoint.local_shard import LocalShard
from axonn.config.train_config import OptimizerConfig, PrecisionConfig
from axonn.device.streams import Timeline
from axonn.distributed.collectives import Call, Collectives, SerialCollectives
from axonn.distributed.runtime import connect
from axonn.distributed.transport import InProcessCollectives, InProcessWorld
from axonn.grid import ProcessGrid
from axonn.inter_layer.stage import ParameterSpec
from axonn.optim.algorithms.registry import ALGORITHMS
from axonn.optim.model_optimizer import ModelMemory, ModelOptimizer, StepResult
from axonn.placement import Cut, Placement
from axonn.spans import Span, SpanRecorder
from tests.helpers.shard_cases import part_of

CPU = torch.device("cpu")
# None is a default, so an option that gets lost shows.
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 2e-3, "betas": (0.85, 0.98), "eps": 1e-7, "weight_decay": 0.05},
    "sgd": {"lr": 2.0, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
}
TORCH: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
"""PyTorch's own, by the name of the algorithm."""
SHAPES = {"matrix": (7, 5), "bias": (3,), "scalar": (), "long": (41,)}
TIED_SHAPE = (4, 6)
CUT: dict[str, tuple[tuple[int, ...], tuple[Cut, ...]]] = {
    "both": ((8, 12), (Cut(0, "col", (8,)), Cut(1, "row", (12,)))),
    "fused": ((12, 2), (Cut(0, "col", (4, 8)),)),
    "rows": ((12,), (Cut(0, "row", (12,)),)),
    "tied": (TIED_SHAPE, (Cut(0, "col", (4,)), Cut(1, "row", (6,)))),
}
"""Parameters that grids with tensor axes cut, and how. All others are repeated there."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "float64": {"compute": "float64"},
    "float32": {"compute": "float32"},
    "float32, scaled": {"compute": "float32", "loss_scale": 1024.0},
    "float32 over float64": {"compute": "float32", "master": "float64"},
    "bfloat16": {"compute": "bfloat16"},
    "bfloat16 over float32": {"compute": "bfloat16", "gradients": "float32"},
    "float16": {"compute": "float16"},
    "float16, constant scale": {"compute": "float16", "loss_scale": 64.0},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A grid whose stages hold one of each of SHAPES, and with `tied` one parameter on the first and the last stage.

    Where there are tensor axes, they hold their parts of what is CUT too.
    """

    data: int = 1
    inter: int = 1
    row: int = 1
    col: int = 1
    tied: bool = False
    steps: int = 4
    precision: str = "float64"
    algorithm: str = "adamw"
    options: dict[str, Any] = field(default_factory=dict)
    spike: tuple[int, int, float] | None = None
    """(step, rank, value): what one element of one gradient of one rank then is, loss scale included."""

    @property
    def grid(self) -> ProcessGrid:
        return ProcessGrid(data=self.data, inter=self.inter, row=self.row, col=self.col)

    @property
    def config(self) -> OptimizerConfig:
        own = OPTIONS[self.algorithm] | {"bsize": 16, "k": 2} | self.options
        return ALGORITHMS[self.algorithm].config(name=self.algorithm, **own)


@dataclass
class Outcome:
    """What one rank has after each step, and at the end."""

    results: list[StepResult] = field(default_factory=list)
    states: list[dict[str, torch.Tensor]] = field(default_factory=list)
    parameters: list[dict[str, torch.Tensor]] = field(default_factory=list)
    progress: list[dict[str, int | float]] = field(default_factory=list)
    calls: Counter[Call] = field(default_factory=Counter)
    """Of the last step."""
    spans: list[Span] = field(default_factory=list)
    memory: ModelMemory | None = None


def placements_of(case: Case, stage: int) -> dict[str, Placement]:
    """The parameters of a stage; as layers do, without cuts along a single rank."""

    def place(name: str, shape: tuple[int, ...], stages: tuple[int, ...] = ()) -> Placement:
        cuts = tuple(cut for cut in CUT.get(name, ((), ()))[1] if case.grid.extent(cut.axis) > 1)
        return Placement(shape=shape, cuts=cuts, tied_stages=stages)

    cut = {name: shape for name, (shape, _) in CUT.items() if name != "tied" and case.grid.tensor > 1}
    found = {f"stage{stage}.{name}": place(name, shape) for name, shape in (cut | SHAPES).items()}
    ends = (0, case.inter - 1)
    if case.tied and stage in ends:
        found["tied"] = place("tied", TIED_SHAPE, ends if case.inter > 1 else ())
    return found


def parts_of(case: Case, rank: int, tensors: dict[str, torch.Tensor]) -> dict[str, LocalShard]:
    """A rank's parameters, or what is like them, as parts."""
    here = case.grid.coordinates(rank)
    placements = placements_of(case, here.inter)
    return {name: LocalShard.placed(tensor, placements[name], case.grid, here) for name, tensor in tensors.items()}


@cache
def random_value(shape: tuple[int, ...], *key: object) -> torch.Tensor:
    """float64 values that are a function of the key; not to be changed."""
    seed = sum(ord(c) * 31**i for i, c in enumerate(repr(key))) % 2**62
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def initialise(name: str, tensor: torch.Tensor) -> None:
    tensor.copy_(random_value(tuple(tensor.shape), "weight", name))


def gradient(name: str, shape: tuple[int, ...], step: int, data: int, stage: int) -> torch.Tensor:
    """Of one replica's mean loss: a tied parameter has another on each of its stages.

    Small enough for the first loss scale of float16.
    """
    return random_value(shape, "gradient", name, step, data, stage) * 2.0**-6


def specs_of(case: Case, rank: int) -> list[ParameterSpec]:
    dtype = getattr(torch, PrecisionConfig(**PRECISIONS[case.precision]).compute)
    return [
        ParameterSpec(
            name=name,
            parameter=nn.Parameter(torch.empty(placement.local_shape(case.grid), dtype=dtype, device="meta")),
            placement=placement,
        )
        for name, placement in placements_of(case, case.grid.coordinates(rank).inter).items()
    ]


def make_optimizer(
    case: Case,
    *,
    rank: int = 0,
    collectives: Collectives | None = None,
    specs: list[ParameterSpec] | None = None,
    spans: SpanRecorder | None = None,
) -> tuple[ModelOptimizer, list[ParameterSpec]]:
    specs = specs_of(case, rank) if specs is None else specs
    placements = {spec.name: spec.placement for spec in specs}
    here = case.grid.coordinates(rank)

    def initialise_part(name: str, tensor: torch.Tensor) -> None:
        whole = random_value(placements[name].shape, "weight", name)
        tensor.copy_(part_of(whole, placements[name], case.grid, here))

    optimizer = ModelOptimizer(
        specs,
        grid=case.grid,
        rank=rank,
        collectives=collectives or SerialCollectives(case.grid, rank),
        config=case.config,
        precision=PrecisionConfig(**PRECISIONS[case.precision]),
        initialise=initialise_part,
        timeline=Timeline(CPU, spans),
        ties=[(0, case.inter - 1)] if case.tied and case.inter > 1 else [],
    )
    return optimizer, specs


def give_gradients(optimizer: ModelOptimizer, specs: list[ParameterSpec], case: Case, rank: int, step: int) -> None:
    """What a backward leaves behind: this rank's gradients of the mean loss over all replicas, scaled."""
    here = case.grid.coordinates(rank)
    optimizer.zero()
    for spec in specs:
        grad = spec.parameter.grad
        assert grad is not None
        whole = gradient(spec.name, spec.placement.shape, step, here.data, here.inter)
        value = part_of(whole, spec.placement, case.grid, here)
        grad.add_((value * optimizer.loss_scale / case.data).to(grad.dtype))
    if case.spike is not None and case.spike[:2] == (step, rank):
        assert specs[-1].parameter.grad is not None
        specs[-1].parameter.grad.view(-1)[2] = case.spike[2]


def optimize(case: Case, rank: int = 0, collectives: Collectives | None = None) -> Outcome:
    spans = SpanRecorder(rank)
    optimizer, specs = make_optimizer(case, rank=rank, collectives=collectives, spans=spans)
    outcome = Outcome()
    for step in range(case.steps):
        give_gradients(optimizer, specs, case, rank, step)
        before = Counter() if collectives is None else collectives.calls.copy()
        outcome.results.append(optimizer.step(step))
        outcome.calls = Counter() if collectives is None else collectives.calls - before
        outcome.states.append({name: part.tensor.clone() for name, part in optimizer.state_tensors().items()})
        outcome.parameters.append({spec.name: spec.parameter.detach().clone() for spec in specs})
        outcome.progress.append(optimizer.progress())
        spans.step += 1
    outcome.spans = spans.spans
    outcome.memory = optimizer.memory()
    return outcome


def optimize_in_process(case: Case) -> list[Outcome]:
    world = InProcessWorld(case.grid.size)
    return world.run(lambda rank: optimize(case, rank, InProcessCollectives(world, case.grid, rank)))


def optimize_over_gloo(comm: Any, case: Case) -> Outcome:
    """A job of the rank pool."""
    with connect(case.grid, comm=comm) as runtime:
        return optimize(case, runtime.rank, runtime.collectives)


@dataclass
class Reference:
    """torch's optimizer on the whole model in float64, with each gradient summed over replicas and tied stages."""

    weights: dict[str, torch.Tensor]
    norms: list[float]


def torch_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """PyTorch's own, with the hyperparameters of `config`."""
    own = type(config).model_fields.keys() - OptimizerConfig.model_fields.keys() | {"lr"}
    optimizer: torch.optim.Optimizer = TORCH[config.name](parameters, **{key: getattr(config, key) for key in own})
    return optimizer


def reference(case: Case) -> Reference:
    parameters: dict[str, nn.Parameter] = {}
    for stage in range(case.inter):
        for name, placement in placements_of(case, stage).items():
            parameters.setdefault(name, nn.Parameter(random_value(placement.shape, "weight", name).clone()))
    optimizer = torch_optimizer(case.config, parameters.values())
    clip = case.config.clip_norm
    norms = []
    for step in range(case.steps):
        for name, parameter in parameters.items():
            stages = [s for s in range(case.inter) if name in placements_of(case, s)]
            parts = [gradient(name, tuple(parameter.shape), step, d, s) for d in range(case.data) for s in stages]
            parameter.grad = torch.stack(parts).sum(0) / case.data
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), float("inf") if clip is None else clip)))
        optimizer.step()
    return Reference({name: parameter.detach() for name, parameter in parameters.items()}, norms)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].view(-1).view(torch.uint8), b[name].view(-1).view(torch.uint8)) for name in a
    )
