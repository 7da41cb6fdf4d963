"""PyTorch's own pipeline parallelism (`torch.distributed.pipelining`), with its schedules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.distributed.pipelining.stage import _PipelineStageBase

from axonn.config.train_config import TrainConfig
from axonn.distributed.runtime import Runtime
from axonn.inter_layer.stage import virtual_spans
from axonn.models.gpt.gpt_model import GPT
from axonn.schedules import ChunkLayout, ScheduleSpec
from axonn.spans import SpanRecorder
from axonn.training.framework import InProcessFramework
from baselines.adapters.adapter_common import (
    Batches,
    Layers,
    gpt_of,
    layers_of,
    lone_process_group,
    loss_of,
    make_optimizer,
    unsupported,
)

Schedule = PipelineScheduleSingle | PipelineScheduleMulti


class TorchPipeliningTrainer:
    """The same layers, cut at the same places, from the same initial weights, run by PyTorch's schedule."""

    def __init__(self, config: TrainConfig, runtime: Runtime, layout: ChunkLayout, kind: type[Schedule]) -> None:
        stage = config.grid.coordinates(runtime.rank).inter
        model = GPT(gpt_of(config))
        spans = virtual_spans(model, layout)
        virtual = [layout.virtual(stage, chunk) for chunk in range(layout.chunks)]
        self._batches = Batches(config, runtime.device)
        self._chunks = [Layers(model, spans[v], config, device=runtime.device) for v in virtual]
        self._device = runtime.device
        self._first = 0 in virtual
        self._last = layout.virtual_stages - 1 in virtual
        stages: list[_PipelineStageBase] = [
            PipelineStage(module, v, layout.virtual_stages, runtime.device)
            for module, v in zip(self._chunks, virtual, strict=True)
        ]
        microbatches = config.batch_size // config.microbatch_size
        self._schedule = (
            kind(stages[0], microbatches, loss_fn=loss_of(model))
            if issubclass(kind, PipelineScheduleSingle)
            else kind(stages, microbatches, loss_fn=loss_of(model))
        )
        self._optimizer = make_optimizer(chain.from_iterable(c.parameters() for c in self._chunks), config)

    def layers(self) -> dict[str, nn.Module]:
        return layers_of(self._chunks)

    def train_batch(self, step: int) -> float:
        inputs, targets = self._batches(step)
        self._optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        arguments = (inputs,) if self._first else ()
        # Nobody needs the logits, and concatenating them would cost time.
        if self._last:
            self._schedule.step(*arguments, target=targets, losses=losses, return_outputs=False)
        else:
            self._schedule.step(*arguments, return_outputs=False)
        self._optimizer.step()
        loss = torch.zeros(1, dtype=torch.float64, device=self._device)
        if losses:
            loss[0] = torch.stack(losses).mean().detach()
        dist.all_reduce(loss)
        return float(loss)


class TorchPipelining(InProcessFramework):
    """1F1B: one stage per rank."""

    label = "PyTorch 1F1B"
    kind: ClassVar[type[Schedule]] = Schedule1F1B
    recorded: ClassVar[ScheduleSpec] = ScheduleSpec(name="1f1b")

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self, config: TrainConfig) -> str | None:
        grid = config.grid
        if grid.data * grid.tensor > 1:
            return "torch.distributed.pipelining is run with G_inter only here; set the other axes to 1"
        if (
            reason := unsupported(config, schedule=self.schedule(config))
            or self._too_few_layers(config)
            or self._wrong_number(config)
        ) is not None:
            return reason
        return (
            "torch.distributed.pipelining does not tie parameters of two stages" if gpt_of(config).tied_head else None
        )

    def _too_few_layers(self, config: TrainConfig) -> str | None:
        chunks = self.recorded.chunks
        layers, needed = len(GPT(gpt_of(config)).layers), chunks * config.grid.inter
        if layers < needed:
            return f"it places {chunks} chunks per stage, {needed} in all, of {layers} layers; lower G_inter"
        return None

    def _wrong_number(self, config: TrainConfig) -> str | None:
        """Return why the schedule cannot run this number of microbatches, or None."""
        if config.batch_size // config.microbatch_size < config.grid.inter:
            return "its 1F1B needs at least as many microbatches as stages; raise batch_size or lower microbatch_size"
        return None

    def schedule(self, config: TrainConfig) -> ScheduleSpec | None:
        return self.recorded

    @contextmanager
    def trainer(
        self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None
    ) -> Iterator[TorchPipeliningTrainer]:
        with nullcontext() if dist.is_initialized() else lone_process_group("gloo"):
            yield TorchPipeliningTrainer(config, runtime, self.recorded.layout(config.grid.inter), self.kind)


class TorchPipeliningGPipe(TorchPipelining):
    """GPipe: all forwards, then all backwards."""

    label = "PyTorch GPipe"
    kind = ScheduleGPipe
    recorded = ScheduleSpec(name="gpipe")

    def _wrong_number(self, config: TrainConfig) -> str | None:
        return None


class TorchPipeliningInterleaved(TorchPipelining):
    """Interleaved 1F1B: two chunks of layers per rank, in loops.

    Narayanan et al., SC 2021, section 2.2.
    """

    label = "PyTorch interleaved 1F1B"
    kind = ScheduleInterleaved1F1B
    recorded = ScheduleSpec(name="interleaved-1f1b", chunks=2)

    def _wrong_number(self, config: TrainConfig) -> str | None:
        microbatches = config.batch_size // config.microbatch_size
        rounds = max(1, microbatches // config.grid.inter)
        if microbatches % rounds:
            return (
                f"it runs {microbatches} microbatches in {rounds} rounds, which must be equal; "
                f"make them a multiple of G_inter = {config.grid.inter} by batch_size"
            )
        return None


class TorchPipeliningZBV(TorchPipelining):
    """Zero-bubble V: two chunks of layers per rank, in a V, and backwards in two halves.

    Qi et al., arXiv 2401.10241, section 6.
    """

    label = "PyTorch ZBV"
    kind = ScheduleZBVZeroBubble
    recorded = ScheduleSpec(name="zero-bubble", chunks=2, placement="v")

    def _wrong_number(self, config: TrainConfig) -> str | None:
        return None
