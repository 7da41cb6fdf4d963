"""Trains a small GPT on a grid, over MPI or in process, and compares every rank with a serial run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from axonn.collectives import Call, Collectives
from axonn.config import GPTConfig, OptimizerConfig, PrecisionConfig
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.models.gpt import GPT
from axonn.runtime import connect
from axonn.schedules import ScheduleSpec
from axonn.trace import SpanRecorder
from axonn.transport import InProcessCollectives, InProcessTransport, InProcessWorld, Transport

STEPS = 5
ROWS = 4
"""Rows of one microbatch over all pipelines: every G_data of the tests divides it."""
BSIZE = 1500
CHUNK = 4 * BSIZE
"""Elements that are reduced at once, unless a case says another k."""
# None is a default, so an option that gets lost shows. Where a gradient is far below eps, Adam's step is proportional
# to it; with the usual 1e-8 the step would be the sign of float32's rounding errors.
OPTIMIZER = OptimizerConfig(lr=2e-3, betas=(0.85, 0.98), eps=1e-6, weight_decay=0.05)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration. A batch has ROWS rows for each microbatch, whatever the grid."""

    data: int = 1
    inter: int = 1
    microbatches: int = 1
    schedule: str = "message-driven"
    limit: int | None = None
    pick: str = "backward-first"
    chunks: int = 1
    placement: Any = "loop"
    dtype: str = "float64"
    tied: bool = False
    steps: int = STEPS
    recompute: Any = None
    offloaded: bool = False
    k: int | None = 4
    clip: float | None = None
    transport: Any = "mpi"
    precision: PrecisionConfig | None = None
    same_batch: bool = False
    """Train on one batch again and again, so that the loss falls."""
    loss_scale: float | None = None
    """Where a dynamic one begins."""

    @property
    def grid(self) -> ProcessGrid:
        return ProcessGrid(data=self.data, inter=self.inter)

    @property
    def batch(self) -> int:
        return ROWS * self.microbatches

    @property
    def model(self) -> GPTConfig:
        return GPTConfig(name="test", layers=6, hidden=24, heads=3, seq_len=10, vocab=61, tied_head=self.tied)


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
    changed_by_evaluation: set[str] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    """Collectives issued by the last step's evaluation and training."""
    held: int = 0


def batch_of(case: Case, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a whole batch."""
    generator = torch.Generator().manual_seed(1000 + (0 if case.same_batch else step))
    tokens = torch.randint(0, case.model.vocab, (case.batch, case.model.seq_len + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def optimizer_of(case: Case) -> OptimizerConfig:
    """Small buckets, so that every stage has several."""
    placement: Any = "offloaded" if case.offloaded else "device"
    changes = {"placement": placement, "bsize": BSIZE, "k": case.k, "clip_norm": case.clip}
    return OPTIMIZER.model_copy(update=changes)


def make_engine(case: Case, rank: int, transport: Transport | None, collectives: Collectives | None) -> Engine:
    return Engine(
        GPT(case.model),
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
        seed=7,
        spans=SpanRecorder(rank),
    )


def train_step(engine: Engine, case: Case, step: int, outcome: Outcome) -> None:
    """Evaluate a batch, train on it, and note what this rank sees of both."""
    rows = engine.shard(0)
    inputs, targets = (t[rows.start : rows.stop] for t in batch_of(case, step))
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
    outcome.gradients.append({s.name: s.parameter.grad.clone() for s in engine.specs if s.parameter.grad is not None})
    outcome.parameters = {s.name: s.parameter.detach().clone() for s in engine.specs}
    outcome.held = engine.held_microbatches


def train(case: Case, rank: int, transport: Transport | None, collectives: Collectives | None) -> Outcome:
    engine = make_engine(case, rank, transport, collectives)
    if case.loss_scale is not None:
        engine.load_progress({**engine.progress(), "loss_scale": case.loss_scale})
    outcome = Outcome()
    for step in range(case.steps):
        before = len(collectives.calls) if collectives is not None else 0
        train_step(engine, case, step, outcome)
        outcome.calls = collectives.calls[before:] if collectives is not None else []
    return outcome


def _masters(engine: Engine) -> dict[str, torch.Tensor]:
    prefix = "master."
    return {n.removeprefix(prefix): t.clone() for n, t in engine.state_tensors().items() if n.startswith(prefix)}


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
    with connect(case.grid, comm=comm, transport=case.transport) as runtime:
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
    return _serial(case.microbatches, case.tied, case.dtype, case.steps, case.clip)


def serial_model(case: Case) -> tuple[GPT, dict[str, nn.Module], dict[str, nn.Parameter]]:
    """The model, all its layers in the case's type, and their parameters by name, which are still to be initialised."""
    model = GPT(case.model)
    dtype = getattr(torch, case.dtype)
    modules = {layer.name: layer.build().to(dtype) for layer in model.layers}
    named = {f"{n}.{p}": value for n, m in modules.items() for p, value in m.named_parameters()}
    if case.tied:
        modules["head"].output.weight = modules["embedding"].tokens.weight
        del named["head.output.weight"]
    return model, modules, named


@cache
def _serial(microbatches: int, tied: bool, dtype_name: str, steps: int, clip: float | None) -> Outcome:
    case = Case(microbatches=microbatches, tied=tied, dtype=dtype_name, steps=steps)
    model, modules, named = serial_model(case)
    for name, parameter in named.items():
        model.initialise(name, parameter, seed=7)
    o = OPTIMIZER
    optimizer = torch.optim.AdamW(named.values(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    outcome = Outcome()
    for step in range(case.steps):
        x, targets = batch_of(case, step)
        for module in modules.values():
            x = module(x)
        loss = model.loss(x, targets)
        optimizer.zero_grad()
        loss.backward()
        outcome.gradients.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
        if clip is not None:
            outcome.norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), clip)))
        optimizer.step()
        outcome.losses.append(loss.item())
    outcome.evaluations = outcome.losses
    outcome.parameters = {n: p.detach().clone() for n, p in named.items()}
    return outcome
