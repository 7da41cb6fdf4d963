"""Trains a small GPT on a grid, over MPI or in process, and returns what a serial run can be compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from axonn.collectives import Collectives
from axonn.config import GPTConfig
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.models.gpt import GPT
from axonn.runtime import connect
from axonn.schedules import ScheduleSpec
from axonn.trace import SpanRecorder
from axonn.transport import InProcessCollectives, InProcessTransport, InProcessWorld, Transport

STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration. The batch has `data x microbatches` rows times `rows` of each microbatch."""

    data: int = 1
    inter: int = 1
    microbatches: int = 1
    schedule: str = "message-driven"
    limit: int | None = None
    pick: Any = "backward-first"
    dtype: str = "float64"
    tied: bool = False
    batch: int = 8
    steps: int = STEPS

    @property
    def grid(self) -> ProcessGrid:
        return ProcessGrid(data=self.data, inter=self.inter)

    @property
    def model(self) -> GPTConfig:
        return GPTConfig(name="test", layers=6, hidden=24, heads=3, seq_len=10, vocab=61, tied_head=self.tied)


@dataclass
class Outcome:
    """What one rank saw: losses and gradients of each step, parameters at the end, and what is left over."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    held: int = 0


def batch_of(case: Case, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, case.model.vocab, (case.batch, case.model.seq_len + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train(case: Case, rank: int, transport: Transport | None, collectives: Collectives | None) -> Outcome:
    engine = Engine(
        GPT(case.model),
        grid=case.grid,
        rank=rank,
        batch_size=case.batch,
        microbatch_size=case.batch // (case.data * case.microbatches),
        transport=transport,
        collectives=collectives,
        schedule=ScheduleSpec(name=case.schedule, in_flight_limit=case.limit, pick=case.pick),
        dtype=getattr(torch, case.dtype),
        seed=7,
        spans=SpanRecorder(rank),
    )
    outcome = Outcome()
    rows = engine.shard(0)
    for step in range(case.steps):
        inputs, targets = (t[rows.start : rows.stop] for t in batch_of(case, step))
        outcome.evaluations.append(
            engine.evaluate_batch(inputs if engine.is_first_stage else None, targets if engine.is_last_stage else None)
        )
        outcome.losses.append(
            engine.train_batch(inputs if engine.is_first_stage else None, targets if engine.is_last_stage else None)
        )
        outcome.gradients.append({s.name: s.parameter.grad.clone() for s in engine.specs})
    outcome.parameters = {s.name: s.parameter.detach().clone() for s in engine.specs}
    outcome.held = engine.held_microbatches
    return outcome


def train_over_mpi(comm: Any, case: Case) -> Outcome:
    """A job of the rank pool."""
    with connect(case.grid, comm=comm) as runtime:
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
    model = GPT(case.model)
    dtype = getattr(torch, case.dtype)
    modules = {layer.name: layer.build().to(dtype) for layer in model.layers}
    named = {f"{n}.{p}": value for n, m in modules.items() for p, value in m.named_parameters()}
    if case.tied:
        modules["head"].output.weight = modules["embedding"].tokens.weight
        del named["head.output.weight"]
    for name, parameter in named.items():
        model.initialise(name, parameter, seed=7)
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    outcome = Outcome()
    for step in range(case.steps):
        x, targets = batch_of(case, step)
        for module in modules.values():
            x = module(x)
        loss = model.loss(x, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        outcome.losses.append(loss.item())
        outcome.gradients.append({n: p.grad.clone() for n, p in named.items()})
    outcome.evaluations = outcome.losses
    outcome.parameters = {n: p.detach().clone() for n, p in named.items()}
    return outcome
