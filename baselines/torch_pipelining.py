"""PyTorch's own pipeline parallelism (`torch.distributed.pipelining`), with its 1F1B and its zero-bubble V schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble

from axonn.config import ScheduleConfig, TrainConfig
from axonn.grid import ProcessGrid
from axonn.inter_layer.stage import virtual_spans
from axonn.models.gpt import GPT
from axonn.runtime import Runtime
from axonn.schedules import ChunkLayout
from axonn.trace import SpanRecorder
from baselines.common import DEVICE, Batches, Layers, beyond, layers_of, loss_of, make_optimizer

ScheduleName = Literal["1f1b", "zbv"]


class TorchPipeliningTrainer:
    """The same layers, cut at the same places, from the same initial weights, run by PyTorch's schedule."""

    def __init__(self, config: TrainConfig, runtime: Runtime, schedule: ScheduleName) -> None:
        grid = ProcessGrid(**config.grid.model_dump())
        here = grid.coordinates(runtime.rank).inter
        layout = _layout(grid.inter, schedule)
        model = GPT(config.model)
        spans = virtual_spans(model, layout)
        mine = [layout.virtual(here, chunk) for chunk in range(layout.chunks)]
        self._batches = Batches(config)
        self._chunks = [Layers(model, spans[v], config) for v in mine]
        self._first = 0 in mine
        self._last = layout.virtual_stages - 1 in mine
        stages = [
            PipelineStage(module, v, layout.virtual_stages, DEVICE)
            for module, v in zip(self._chunks, mine, strict=True)
        ]
        microbatches = config.batch_size // config.microbatch_size
        self._schedule = (
            Schedule1F1B(stages[0], microbatches, loss_fn=loss_of(model))
            if schedule == "1f1b"
            else ScheduleZBVZeroBubble(stages, microbatches, loss_fn=loss_of(model))
        )
        self._optimizer = make_optimizer(chain.from_iterable(c.parameters() for c in self._chunks), config)

    def layers(self) -> dict[str, nn.Module]:
        return layers_of(self._chunks)

    def train_batch(self, step: int) -> float:
        inputs, targets = self._batches(step)
        self._optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        arguments = (inputs,) if self._first else ()
        # Nobody wants the logits, and putting them together would cost it time.
        if self._last:
            self._schedule.step(*arguments, target=targets, losses=losses, return_outputs=False)
        else:
            self._schedule.step(*arguments, return_outputs=False)
        self._optimizer.step()
        loss = torch.zeros(1, dtype=torch.float64)
        if losses:
            loss[0] = torch.stack(losses).mean().detach()
        dist.all_reduce(loss)
        return float(loss)


def _layout(stages: int, schedule: ScheduleName) -> ChunkLayout:
    return ChunkLayout(stages=stages, chunks=2, placement="v") if schedule == "zbv" else ChunkLayout(stages=stages)


class TorchPipelining:
    """1F1B: one stage per rank."""

    label = "PyTorch 1F1B"
    name: ClassVar[ScheduleName] = "1f1b"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self, config: TrainConfig) -> str | None:
        grid = config.grid
        if grid.data * grid.row * grid.col > 1:
            return "torch.distributed.pipelining is run with G_inter only here; set the other axes to 1"
        if (reason := beyond(config) or self._too_small(config)) is not None:
            return reason
        return "torch.distributed.pipelining does not tie parameters of two stages" if config.model.tied_head else None

    def _too_small(self, config: TrainConfig) -> str | None:
        if config.batch_size // config.microbatch_size < config.grid.inter:
            return "its 1F1B needs at least as many microbatches as stages"
        return None

    def schedule(self, config: TrainConfig) -> ScheduleConfig | None:
        return ScheduleConfig(name="1f1b")

    @contextmanager
    def trainer(
        self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None
    ) -> Iterator[TorchPipeliningTrainer]:
        alone = not dist.is_initialized()
        if alone:
            # It wants a process group even for a single stage.
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield TorchPipeliningTrainer(config, runtime, self.name)
        finally:
            if alone:
                dist.destroy_process_group()


class TorchPipeliningZBV(TorchPipelining):
    """The zero-bubble V schedule (Qi et al., arXiv 2401.10241, section 6): two chunks of layers per rank, in a V."""

    label = "PyTorch ZBV"
    name: ClassVar[ScheduleName] = "zbv"

    def _too_small(self, config: TrainConfig) -> str | None:
        layers, chunks = len(GPT(config.model).layers), 2 * config.grid.inter
        if layers < chunks:
            return f"it places 2 chunks per stage, {chunks} in all, and the model has {layers} layers; lower G_inter"
        return None

    def schedule(self, config: TrainConfig) -> ScheduleConfig | None:
        return ScheduleConfig(name="zero-bubble", chunks=2, placement="v")
