"""Checks that a framework trains as a plain loop over the whole batch does, on every rank."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from mpi4py import MPI

from axonn.config.train_config import TrainConfig, validate
from axonn.distributed.runtime import connect
from axonn.inter_layer.stage import virtual_spans
from axonn.models.gpt.gpt_model import GPT
from axonn.models.initialization import fill
from axonn.schedules import ChunkLayout
from axonn.tensor import TensorContext
from axonn.training.framework import Framework
from baselines.adapters.adapter_common import Batches
from tests.helpers.rank_pool import RankPool

STEPS = 4
HEADS, VOCAB = 3, 257
BOUND = {"float64": 1e-10, "float32": 1e-5}


def model_of(heads: int, vocab: int) -> dict[str, Any]:
    return {"name": "test", "layers": 5, "hidden": 24, "heads": heads, "seq_len": 10, "vocab": vocab}


def config_of(ranks: int, microbatches: int = 6, **changes: Any) -> TrainConfig:
    """Nothing in it is a default, so an option that gets lost shows."""
    plain = {
        "model": model_of(HEADS, VOCAB),
        "grid": {"inter": ranks},
        "batch_size": 2 * microbatches,
        "microbatch_size": 2,
        "optimizer": {"lr": 3e-3, "betas": [0.85, 0.98], "eps": 1e-6, "weight_decay": 0.1},
        "precision": "float64",
        "seed": 5,
    }
    return validate(plain | changes, TrainConfig, where="test")


@cache
def serial_losses(batch_size: int, dtype: str, heads: int = HEADS, vocab: int = VOCAB) -> list[float]:
    """A loop over whole batches: no microbatches, no stages, no fused optimizer."""
    config = config_of(1, batch_size // 2, precision=dtype, model=model_of(heads, vocab))
    model, batches, o = GPT(config.model), Batches(config), config.optimizer
    modules = {layer.name: layer.build(TensorContext.serial()).to(getattr(torch, dtype)) for layer in model.layers}
    named = {f"{n}.{p}": value for n, m in modules.items() for p, value in m.named_parameters()}
    for name, parameter in named.items():
        fill(parameter, model.initial(name), name=name, seed=config.seed)
    optimizer = torch.optim.AdamW(named.values(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    losses = []
    for step in range(STEPS):
        x, targets = batches(step)
        for module in modules.values():
            x = module(x)
        loss = model.loss(x, targets, TensorContext.serial())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(comm: MPI.Intracomm, framework: type[Framework], config: TrainConfig) -> tuple[list[float], list[str]]:
    """A job of the rank pool: losses and the names of the layers here. Sets up twice: nothing may be left over."""
    results = []
    with connect(config.grid, comm=comm) as runtime:
        for _ in range(2):
            with framework().trainer(config, runtime, None) as trainer:
                layers: Any = trainer
                results.append(([trainer.train_batch(step) for step in range(STEPS)], list(layers.layers())))
    assert results[0] == results[1]
    return results[0]


def check(pool: RankPool, framework: type[Framework], config: TrainConfig, layout: ChunkLayout) -> None:
    assert framework().unavailable(config) is None
    dtype = config.precision.compute
    serial = serial_losses(config.batch_size, dtype, config.model.heads, config.model.vocab)
    assert len(set(serial)) == STEPS
    model = GPT(config.model)
    spans = virtual_spans(model, layout)
    grid = config.grid
    for rank, (losses, names) in enumerate(pool.run(train, framework, config, ranks=grid.size)):
        assert losses == pytest.approx(serial, rel=BOUND[dtype], abs=0), rank
        stage = grid.coordinates(rank).inter
        mine = [spans[layout.virtual(stage, chunk)] for chunk in range(layout.chunks)]
        assert names == [model.layers[i].name for span in mine for i in span], rank
