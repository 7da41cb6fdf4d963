"""Trains a small GPT or U-Net on a grid, over MPI or in process, and compares every rank with a serial run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from axonn.config.model_config import ModelConfig
from axonn.config.train_config import OptimizerConfig, PrecisionConfig
from axonn.device.devices import rank_device
from axonn.distributed.collectives import Call, Collectives
from axonn.distributed.runtime import connect
from axonn.distributed.transport import (
    Decisions,
    InProcessCollectives,
    InProcessTransport,
    InProcessWorld,
    SentMessage,
    Transport,
)
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.models.base import PipelineModel
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.initialization import fill
from axonn.models.registry import make_model
from axonn.models.unet.unet_config import UNetConfig
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.placement import Placement
from axonn.schedules import ScheduleSpec
from axonn.spans import SpanRecorder
from axonn.tensor import TensorContext
from tests.helpers.optimizer_cases import torch_optimizer

STEPS = 5
ROWS = 4
"""Rows of one microbatch over all pipelines: every G_data of the tests divides it."""
SEED = 7
COMPILE: Literal["auto", "always"] = "auto"
BSIZE = 1500
CHUNK = 4 * BSIZE
"""Elements that are reduced at once, unless a case says another k."""
# None is a default, so an option that gets lost shows. Where a gradient is far below eps, Adam's step is proportional
# to it; with the usual 1e-8 the step would be the sign of float32's rounding errors.
OPTIMIZER = AdamWConfig(lr=2e-3, betas=(0.85, 0.98), eps=1e-6, weight_decay=0.05)


# Extents up to 4 divide it. Groups of norms lie across ranks, and across the seams of concatenated channels.
UNET = UNetConfig(
    name="test",
    image_size=8,
    channels=3,
    width=8,
    multipliers=(1, 2),
    blocks=1,
    attention_levels=(1,),
    head_channels=4,
    groups=4,
    noise_steps=50,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration. A batch has ROWS rows for each microbatch, whatever the grid."""

    model_kind: Literal["gpt", "unet"] = "gpt"
    data: int = 1
    inter: int = 1
    row: int = 1
    col: int = 1
    sub_shards: int | None = None
    microbatches: int = 1
    schedule: str = "message-driven"
    limit: int | None = None
    pick: str = "backward-first"
    chunks: int = 1
    placement: Any = "loop"
    dtype: str = "float64"
    tied: bool = False
    """Of a GPT, as the next two."""
    heads: int = 4
    vocab: int = 60
    dropout: float = 0.0
    """In the residual branches; in a GPT also of the attention's probabilities."""
    steps: int = STEPS
    recompute: Any = None
    offloaded: bool = False
    k: int | None = 4
    optimizer: OptimizerConfig = OPTIMIZER
    """But for what the fields beside this one say."""
    clip: float | None = None
    transport: Any = "mpi"
    precision: PrecisionConfig | None = None
    same_batch: bool = False
    """Train on one batch again and again, so that the loss falls."""
    loss_scale: float | None = None
    """Where a dynamic one begins."""
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def grid(self) -> ProcessGrid:
        return ProcessGrid(data=self.data, inter=self.inter, row=self.row, col=self.col)

    @property
    def batch(self) -> int:
        return ROWS * self.microbatches

    @property
    def model(self) -> ModelConfig:
        if self.model_kind == "unet":
            return UNET.model_copy(update={"dropout": self.dropout})
        return GPTConfig(
            name="test",
            layers=6,
            hidden=24,
            heads=self.heads,
            seq_len=10,
            vocab=self.vocab,
            tied_head=self.tied,
            dropout=self.dropout,
            attention_dropout=self.dropout,
        )


@dataclass
class Outcome:
    """What one rank saw: losses and gradients of each step, parameters at the end, and what is left over."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    masters: dict[str, torch.Tensor] = field(default_factory=dict)
    changed_by_skipped_steps: set[str] = field(default_factory=set)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    placements: dict[str, Placement] = field(default_factory=dict)
    """What parts of the whole parameters (and of their gradients) these are."""
    changed_by_evaluation: set[str] = field(default_factory=set)
    calls: Counter[Call] = field(default_factory=Counter)
    """Collectives issued by the last step's evaluation and training."""
    messages: Counter[SentMessage] = field(default_factory=Counter)
    """Messages sent in all steps."""
    decisions: Decisions = field(default_factory=Decisions)
    """What was told in all steps."""
    held: int = 0


def batch_of(case: Case, step: int) -> tuple[Any, torch.Tensor]:
    """Inputs (a tuple of them for a U-Net) and targets of a whole batch."""
    generator = torch.Generator().manual_seed(1000 + (0 if case.same_batch else step))
    model = case.model
    if isinstance(model, GPTConfig):
        tokens = torch.randint(0, model.vocab, (case.batch, model.seq_len + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    shape = (case.batch, model.channels, model.image_size, model.image_size)
    noisy, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()
    return (noisy, torch.randint(0, model.noise_steps, (case.batch,), generator=generator)), noise


def _tuple(tensors: Any) -> tuple[torch.Tensor, ...]:
    return tensors if isinstance(tensors, tuple) else (tensors,)


def optimizer_of(case: Case) -> OptimizerConfig:
    """Small buckets, so that every stage has several."""
    placement: Any = "offloaded" if case.offloaded else "device"
    changes = {"placement": placement, "bsize": BSIZE, "k": case.k, "clip_norm": case.clip}
    return case.optimizer.model_copy(update=changes)


def make_engine(case: Case, rank: int, transport: Transport | None, collectives: Collectives | None) -> Engine:
    return Engine(
        make_model(case.model),
        grid=case.grid,
        rank=rank,
        batch_size=case.batch,
        microbatch_size=ROWS // case.data,
        transport=transport,
        collectives=collectives,
        schedule=ScheduleSpec(
            name=case.schedule,
            in_flight_limit=case.limit,
            pick=case.pick,
            chunks=case.chunks,
            placement=case.placement,
        ),
        optimizer=optimizer_of(case),
        precision=case.precision or PrecisionConfig(compute=case.dtype),  # type: ignore[arg-type]
        activation_checkpointing=case.recompute,
        overdecomposition=case.sub_shards,
        compile=COMPILE,
        device=rank_device(case.device),
        seed=SEED,
        spans=SpanRecorder(rank),
    )


def train_step(engine: Engine, case: Case, step: int, outcome: Outcome) -> None:
    """Evaluate a batch, train on it, and note what this rank sees of both."""
    rows = engine.shard(0)
    whole, whole_targets = batch_of(case, step)
    inputs: Any = tuple(t[rows.start : rows.stop] for t in _tuple(whole))
    targets = whole_targets[rows.start : rows.stop]
    # A rank is given only what it is meant to need.
    shard = inputs if engine.is_first_stage else None, targets if engine.is_last_stage else None
    before = _state(engine)
    outcome.evaluations.append(engine.evaluate_batch(*shard))
    after = _state(engine)
    outcome.changed_by_evaluation |= {
        name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))
    }
    masters = _masters(engine)
    result = engine.train_batch(*shard)
    outcome.applied.append(result.applied)
    outcome.scales.append(result.loss_scale)
    outcome.masters = _masters(engine)
    if not result.applied:
        outcome.changed_by_skipped_steps |= {n for n, m in masters.items() if not torch.equal(m, outcome.masters[n])}
    outcome.losses.append(result.loss)
    outcome.norms.append(result.gradient_norm)
    gradients = {s.name: s.parameter.grad for s in engine.specs if s.parameter.grad is not None}
    outcome.gradients.append({name: gradient.to("cpu", copy=True) for name, gradient in gradients.items()})
    outcome.parameters = {s.name: s.parameter.detach().to("cpu", copy=True) for s in engine.specs}
    outcome.placements = {s.name: s.placement for s in engine.specs}
    outcome.held = engine.held_microbatches


def train(case: Case, rank: int, transport: Transport | None, collectives: Collectives | None) -> Outcome:
    engine = make_engine(case, rank, transport, collectives)
    if case.loss_scale is not None:
        engine.load_progress({**engine.progress(), "loss_scale": case.loss_scale})
    outcome = Outcome()
    for step in range(case.steps):
        before = Counter() if collectives is None else collectives.calls.copy()
        train_step(engine, case, step, outcome)
        outcome.calls = Counter() if collectives is None else collectives.calls - before
    if transport is not None:
        outcome.messages, outcome.decisions = transport.calls, transport.decisions
    return outcome


def _masters(engine: Engine) -> dict[str, torch.Tensor]:
    prefix = "master."
    parts = {n: part.tensor for n, part in engine.state_tensors().items() if n.startswith(prefix)}
    return {name.removeprefix(prefix): tensor.to("cpu", copy=True) for name, tensor in parts.items()}


def _state(engine: Engine) -> dict[str, torch.Tensor | None]:
    state: dict[str, torch.Tensor | None] = {}
    for spec in engine.specs:
        gradient = spec.parameter.grad
        state[spec.name] = spec.parameter.detach().clone()
        state[f"gradient of {spec.name}"] = None if gradient is None else gradient.clone()
    return state


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def train_over_mpi(comm: Any, case: Case) -> Outcome:
    """A job of the rank pool."""
    with connect(case.grid, comm=comm, transport=case.transport, device=rank_device(case.device)) as runtime:
        return train(case, runtime.rank, runtime.transport, runtime.collectives)


def train_in_process(case: Case, *, order_seed: int | None = None) -> list[Outcome]:
    world = InProcessWorld(case.grid.size, order_seed=order_seed)
    return world.run(
        lambda rank: train(
            case,
            rank,
            InProcessTransport(world, rank),
            InProcessCollectives(world, case.grid, rank),
        )
    )


def serial_reference(case: Case) -> Outcome:
    """The same training in a plain PyTorch loop over the whole batch: no engine, no schedule, no microbatches."""
    keys = ("model_kind", "microbatches", "tied", "heads", "vocab", "dropout", "dtype", "steps", "clip", "optimizer")
    return _serial(**{key: getattr(case, key) for key in keys})


def serial_model(
    case: Case, context: TensorContext | None = None
) -> tuple[PipelineModel, dict[str, nn.Module], dict[str, nn.Parameter]]:
    """The model, all its layers in the case's type, and their parameters by name, which are still to be initialised."""
    model = make_model(case.model)
    dtype = getattr(torch, case.dtype)
    context = context or TensorContext.serial(seed=SEED)
    modules = {layer.name: layer.build(context).to(dtype) for layer in model.layers}
    named = {f"{n}.{p}": value for n, m in modules.items() for p, value in m.named_parameters()}
    if case.tied:
        modules["head"].output.weight = modules["embedding"].tokens.weight
        del named["head.output.weight"]
    return model, modules, named


@cache
def _serial(**keys: Any) -> Outcome:
    case = Case(**keys)
    context = TensorContext.serial(seed=SEED)
    model, modules, named = serial_model(case, context)
    for name, parameter in named.items():
        fill(parameter, model.initial(name), name=name, seed=SEED)
    optimizer = torch_optimizer(case.optimizer, named.values())
    outcome = Outcome()

    def loss_of(step: int, *, training: bool) -> torch.Tensor:
        x, targets = batch_of(case, step)
        with context.positions.at(step, range(step * case.batch, (step + 1) * case.batch)):
            for module in modules.values():
                x = module.train(training)(*_tuple(x))
        return model.loss(x, targets, context)

    for step in range(case.steps):
        with torch.no_grad():
            outcome.evaluations.append(loss_of(step, training=False).item())
        loss = loss_of(step, training=True)
        optimizer.zero_grad()
        loss.backward()
        outcome.gradients.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
        if case.clip is not None:
            outcome.norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), case.clip)))
        optimizer.step()
        outcome.losses.append(loss.item())
    outcome.parameters = {n: p.detach().clone() for n, p in named.items()}
    outcome.placements = {n: Placement(shape=tuple(p.shape)) for n, p in named.items()}
    return outcome
