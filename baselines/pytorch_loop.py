"""The plain PyTorch training loop on one rank: gradient accumulation over microbatches, then a step of AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from axonn.config import ScheduleConfig, TrainConfig
from axonn.models.gpt import GPT
from axonn.runtime import Runtime
from axonn.trace import SpanRecorder
from baselines.common import Batches, Layers, beyond, layers_of, loss_of, make_optimizer
from experiments.framework import InProcessFramework


class PlainLoopTrainer:
    """All layers on one rank."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._batches = Batches(config)
        self._model = GPT(config.model)
        self._loss = loss_of(self._model)
        self._module = Layers(self._model, range(len(self._model.layers)), config)
        self._optimizer = make_optimizer(self._module.parameters(), config)

    def layers(self) -> dict[str, nn.Module]:
        return layers_of([self._module])

    def train_batch(self, step: int) -> float:
        size = self._config.microbatch_size
        inputs, targets = self._batches(step)
        microbatches = self._config.batch_size // size
        self._optimizer.zero_grad()
        total = 0.0
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            loss = self._loss(self._module(x), y) / microbatches
            loss.backward()
            total += loss.item()
        self._optimizer.step()
        return total


class PlainLoop(InProcessFramework):
    """A plain loop on one rank: no parallelism."""

    label = "PyTorch loop"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self, config: TrainConfig) -> str | None:
        grid = config.grid
        if grid.data * grid.inter * grid.row * grid.col > 1:
            return "a plain loop runs on 1 rank"
        return beyond(config)

    def schedule(self, config: TrainConfig) -> ScheduleConfig | None:
        return None

    @contextmanager
    def trainer(self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None) -> Iterator[PlainLoopTrainer]:
        yield PlainLoopTrainer(config)
