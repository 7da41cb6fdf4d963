"""PyTorch's own pipeline parallelism (`torch.distributed.pipelining`), with its 1F1B schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from axonn.config import ScheduleConfig, TrainConfig
from axonn.data.text import TextData
from axonn.grid import ProcessGrid
from axonn.inter_layer.stage import Stage, stage_spans
from axonn.models.gpt import GPT
from axonn.runtime import Runtime
from axonn.trace import SpanRecorder
from baselines.plain_loop import make_optimizer


class TorchPipeliningTrainer:
    """The same layers, cut at the same places, from the same initial weights, run by PyTorch's schedule."""

    def __init__(self, config: TrainConfig, runtime: Runtime) -> None:
        grid = ProcessGrid(**config.grid.model_dump())
        model = GPT(config.model)
        self._config = config
        self._data = TextData(
            config.data.path, seq_len=config.model.seq_len, vocab=config.model.vocab, seed=config.seed
        )
        self._first = grid.is_first_stage(runtime.rank)
        self._last = grid.is_last_stage(runtime.rank)
        device = torch.device("cpu")
        module = Stage(
            model,
            stage_spans(model, grid.inter)[runtime.rank],
            seed=config.seed,
            dtype=getattr(torch, config.precision),
            device=device,
        )
        stage = PipelineStage(module, runtime.rank, grid.inter, device)
        microbatches = config.batch_size // config.microbatch_size
        self._schedule = Schedule1F1B(stage, microbatches, loss_fn=model.loss)
        self._optimizer = make_optimizer(module.parameters(), config)

    def train_batch(self, step: int) -> float:
        first = step * self._config.batch_size
        inputs, targets = self._data.batch(range(first, first + self._config.batch_size))
        self._optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        arguments = (inputs,) if self._first else ()
        if self._last:
            self._schedule.step(*arguments, target=targets, losses=losses)
        else:
            self._schedule.step(*arguments)
        self._optimizer.step()
        loss = torch.zeros(1, dtype=torch.float64)
        if losses:
            loss[0] = torch.stack(losses).mean().detach()
        dist.all_reduce(loss)
        return float(loss)


class TorchPipelining:
    label = "PyTorch 1F1B"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self, config: TrainConfig) -> str | None:
        grid = config.grid
        if grid.data * grid.row * grid.col > 1:
            return "torch.distributed.pipelining is run with G_inter only here; set the other axes to 1"
        if config.model.tied_head:
            return "torch.distributed.pipelining does not tie parameters of two stages"
        if config.batch_size // config.microbatch_size < grid.inter:
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
            yield TorchPipeliningTrainer(config, runtime)
        finally:
            if alone:
                dist.destroy_process_group()
