"""Our own engine behind the interface of all frameworks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch

from axonn.config import ScheduleConfig, TrainConfig
from axonn.data.text import TextData
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.models.gpt import GPT
from axonn.runtime import Runtime
from axonn.trace import SpanRecorder


class EngineTrainer:
    """An `Engine` with its data."""

    def __init__(self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None) -> None:
        self.data = TextData(config.data.path, seq_len=config.model.seq_len, vocab=config.model.vocab, seed=config.seed)
        self.engine = Engine(
            GPT(config.model),
            grid=ProcessGrid(**config.grid.model_dump()),
            rank=runtime.rank,
            batch_size=config.batch_size,
            microbatch_size=config.microbatch_size,
            transport=runtime.transport,
            collectives=runtime.collectives,
            schedule=config.schedule.spec(),
            optimizer=config.optimizer,
            dtype=getattr(torch, config.precision),
            seed=config.seed,
            spans=spans,
        )

    def train_batch(self, step: int) -> float:
        inputs, targets = self.data.batch(self.engine.shard(step))
        return self.engine.train_batch(inputs, targets)


class EngineFramework:
    label = "AxoNN"

    def version(self) -> str:
        return version("axonn-reproduction")

    def unavailable(self, config: TrainConfig) -> str | None:
        return None

    def schedule(self, config: TrainConfig) -> ScheduleConfig | None:
        return config.schedule

    @contextmanager
    def trainer(self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None) -> Iterator[EngineTrainer]:
        yield EngineTrainer(config, runtime, spans)
