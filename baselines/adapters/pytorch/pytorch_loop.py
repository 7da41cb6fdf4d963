"""The plain PyTorch training loop on one rank: gradient accumulation over microbatches, then a step of AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from axonn.config.train_config import TrainConfig
from axonn.distributed.runtime import Runtime
from axonn.models.gpt.gpt_model import GPT
from axonn.schedules import ScheduleSpec
from axonn.spans import SpanRecorder
from axonn.training.framework import InProcessFramework
from baselines.adapters.adapter_common import (
    DEVICE,
    Batches,
    Layers,
    Optimizer,
    gpt_of,
    layers_of,
    loss_of,
    optimizer_of,
    unsupported,
)
from baselines.ranks import plain_gpt


class PlainLoopTrainer:
    """All layers on one rank, as a user of PyTorch writes it: only reading a batch's loss waits for the device.

    `module`, `optimizer` and `loss` (called with outputs and targets): another model of the same function with its own
    weights, and what updates it; by default our layers with our initial weights.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        device: torch.device = DEVICE,
        module: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._config = config
        self._device = device
        self._batches = Batches(config, device)
        self._model = GPT(gpt_of(config))
        self._loss = loss or loss_of(self._model)
        self._module = module or Layers(self._model, range(len(self._model.layers)), config, device=device)
        self._optimizer = optimizer or optimizer_of(self._module, config)

    def layers(self) -> dict[str, nn.Module]:
        assert isinstance(self._module, Layers)
        return layers_of([self._module])

    def train_batch(self, step: int) -> float:
        size = self._config.microbatch_size
        inputs, targets = self._batches(step)
        microbatches = self._config.batch_size // size
        self._optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for x, y in plain_gpt.microbatches(inputs, targets, size):
            loss = self._loss(self._module(x), y) / microbatches
            torch.autograd.backward(loss)
            total += loss.detach()
        self._optimizer.step()
        return float(total)


class PlainLoop(InProcessFramework):
    """A plain loop on one rank: no parallelism."""

    label = "PyTorch loop"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self, config: TrainConfig) -> str | None:
        grid = config.grid
        if grid.size > 1:
            return "a plain loop runs on 1 rank"
        return unsupported(config, schedule=self.schedule(config))

    def schedule(self, config: TrainConfig) -> ScheduleSpec | None:
        return None

    @contextmanager
    def trainer(self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None) -> Iterator[PlainLoopTrainer]:
        yield PlainLoopTrainer(config, device=runtime.device)
