"""The suite's own engine behind the interface of all frameworks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, get_args

from axonn.checkpoint.local_shard import LocalShard
from axonn.config.defaults import sub_shards
from axonn.config.train_config import FloatType, TrainConfig
from axonn.device.devices import DeviceType
from axonn.distributed.runtime import Runtime
from axonn.engine import Engine, microbatches_of
from axonn.errors import AxonnError, LaunchError
from axonn.inter_layer.non_finite import NotFinite
from axonn.inter_layer.stage import virtual_spans
from axonn.models.registry import make_data, make_model
from axonn.observability.traffic import Traffic
from axonn.perf.planner.engine_strategy import as_the_engine, config_of_strategy, differences
from axonn.schedules import ScheduleSpec, make_schedule
from axonn.spans import SpanRecorder
from axonn.training.framework import (
    Adapter,
    Capabilities,
    ClusterWork,
    Framework,
    InProcessFramework,
    Launch,
    PrintedRun,
    ResumableTrainer,
)
from axonn.training.run_folder import NEWEST
from axonn.training.supervision.cluster_launch import data_of, launch_worker, read_run


def layers_of_chunks(config: TrainConfig) -> list[range]:
    """Return the layers of each virtual stage. Raises the error with which every rank would refuse `config`."""
    grid = config.grid
    model = make_model(config.model)
    model.check(grid)
    sub_shards(config.overdecomposition, microbatch_size=config.microbatch_size, grid=grid)
    count = microbatches_of(batch_size=config.batch_size, microbatch_size=config.microbatch_size, grid=grid)
    schedule = make_schedule(config.schedule, stage=0, stages=grid.inter, microbatches=count)
    return virtual_spans(model, schedule.layout)


class EngineTrainer(ResumableTrainer):
    """An `Engine` together with its data."""

    def __init__(self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None) -> None:
        self.data = make_data(config)
        self.engine = Engine(
            make_model(config.model),
            grid=config.grid,
            rank=runtime.rank,
            batch_size=config.batch_size,
            microbatch_size=config.microbatch_size,
            transport=runtime.transport,
            collectives=runtime.collectives,
            schedule=config.schedule,
            optimizer=config.optimizer,
            precision=config.precision,
            activation_checkpointing=config.activation_checkpointing,
            overdecomposition=config.overdecomposition,
            compile=config.compile,
            device=runtime.device,
            seed=config.seed,
            steps=config.steps,
            spans=spans,
        )

    def train_batch(self, step: int) -> float:
        inputs, targets = self.data.batch(self.engine.shard(step))
        self.result = self.engine.train_batch(inputs, targets)
        return self.result.loss

    def evaluate(self, number: int) -> float:
        inputs, targets = self.data.held_out_batch(self.engine.shard(number))
        return self.engine.evaluate_batch(inputs, targets)

    def not_finite(self) -> list[NotFinite]:
        return self.engine.not_finite()

    def data_digest(self) -> str:
        return self.data.digest

    def state_tensors(self) -> dict[str, LocalShard]:
        return self.engine.state_tensors()

    def state_loaded(self) -> None:
        self.engine.state_loaded()

    def progress(self) -> dict[str, int | float]:
        return self.engine.progress()

    def load_progress(self, progress: Mapping[str, Any]) -> None:
        self.engine.load_progress(progress)

    def memory(self) -> dict[str, int]:
        return self.engine.memory()

    def traffic(self) -> list[Traffic]:
        return self.engine.traffic()


class EngineFramework(InProcessFramework):
    """The engine as it trains on this machine."""

    label = "AxoNN"

    def version(self) -> str:
        return version("axonn-reproduction")

    def unavailable(self, config: TrainConfig) -> str | None:
        try:
            layers_of_chunks(config)
        except AxonnError as error:
            return str(error)
        return None

    def schedule(self, config: TrainConfig) -> ScheduleSpec | None:
        return config.schedule

    def sub_shards(self, config: TrainConfig) -> int:
        grid = config.grid
        try:
            return sub_shards(config.overdecomposition, microbatch_size=config.microbatch_size, grid=grid)
        except AxonnError:
            # The configuration does not run at all: `unavailable` says why.
            return config.overdecomposition or 1

    @contextmanager
    def trainer(self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None) -> Iterator[EngineTrainer]:
        yield EngineTrainer(config, runtime, spans)


class EngineAdapter(Adapter):
    """Adapter of the suite's own engine."""

    name = "axonn"
    label = EngineFramework.label

    def capabilities(self) -> Capabilities:
        return Capabilities(
            version=EngineFramework().version(),
            strategies={"": "data x inter-layer x two-dimensional tensor parallelism, any of them together"},
            devices=get_args(DeviceType),
            precisions=get_args(FloatType),
        )

    def framework(self, strategy: str | None) -> Framework:
        if strategy is not None:
            raise LaunchError(f"AxoNN has no named strategies: leave out '/{strategy}', the configuration says it all")
        return EngineFramework()

    def launch(self, work: ClusterWork) -> Launch:
        """Launch the worker on every rank. Raises `LaunchError` for a strategy that the engine cannot run."""
        strategy = work.strategy
        data, notes = data_of(work)
        try:
            config = config_of_strategy(
                as_the_engine(strategy.model_copy(update={"clip_norm": False})),
                work.model,
                batch_size=work.batch_size,
                steps=work.steps,
            )
            # Creates no weights.
            layers_of_chunks(config)
        except AxonnError as error:
            raise LaunchError(f"{work.name} cannot be launched with AxoNN: {error}") from error
        optimizer = config.optimizer.model_copy(update={"clip_norm": work.gradient_clipping})
        if different := differences(strategy):
            notes.insert(0, f"of the strategy, the engine does otherwise: {'; '.join(different)}")
        return launch_worker(
            self.name,
            config.model_copy(update={"optimizer": optimizer, "data": data}),
            device=work.device,
            notes=notes,
            messages_over_mpi=True,
            checkpoint=NEWEST,
            stoppable=True,
        )

    def read(self, lines: Iterable[str]) -> PrintedRun:
        return read_run(lines)
