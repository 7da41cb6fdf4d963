"""PyTorch's own parallelism, in this suite's environment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, get_args

import torch

from axonn.device.devices import DeviceType
from axonn.errors import ConfigError, LaunchError
from axonn.grid import AXES
from axonn.perf.planner.engine_strategy import as_the_engine, config_of_strategy
from axonn.schedules import ScheduleSpec
from axonn.training.framework import Adapter, Capabilities, ClusterWork, Framework, Launch, PrintedRun
from axonn.training.run_folder import NEWEST
from axonn.training.supervision.cluster_launch import data_of, launch_worker, read_run
from baselines.adapters.ignored_settings import ignored_note
from baselines.adapters.pytorch.pytorch_data import TorchDDP, TorchFullyShard
from baselines.adapters.pytorch.pytorch_loop import PlainLoop
from baselines.adapters.pytorch.pytorch_pipelining import (
    TorchPipelining,
    TorchPipeliningGPipe,
    TorchPipeliningInterleaved,
    TorchPipeliningZBV,
)
from baselines.adapters.pytorch.pytorch_tensor import TorchTensorParallel, TorchTensorParallelWholeEmbedding


class PyTorchAdapter(Adapter):
    name = "pytorch"
    label = "PyTorch"
    strategies: ClassVar[dict[str, type[Framework]]] = {
        "loop": PlainLoop,
        "ddp": TorchDDP,
        "fully-shard": TorchFullyShard,
        "gpipe": TorchPipeliningGPipe,
        "1f1b": TorchPipelining,
        "interleaved-1f1b": TorchPipeliningInterleaved,
        "zbv": TorchPipeliningZBV,
        "tensor": TorchTensorParallel,
        "tensor-whole-embedding": TorchTensorParallelWholeEmbedding,
    }

    def capabilities(self) -> Capabilities:
        return Capabilities(
            version=f"torch {torch.__version__}",
            strategies={name: (kind.__doc__ or "").partition("\n")[0] for name, kind in self.strategies.items()},
            devices=get_args(DeviceType),
            precisions=("float32", "float64"),
        )

    def framework(self, strategy: str | None) -> Framework:
        return self.pick(strategy, self.strategies)

    def launch(self, work: ClusterWork) -> Launch:
        """Return the launch in which every rank runs this suite's worker.

        Raises `LaunchError` for work that none of the strategies does.
        """
        name = _strategy_for(work)
        strategy = work.strategy.model_copy(update={"optimizer": "device", "clip_norm": False})
        data, notes = data_of(work)
        try:
            config = config_of_strategy(as_the_engine(strategy), work.gpt, batch_size=work.batch_size, steps=work.steps)
        except ConfigError as error:
            raise LaunchError(f"{work.name} cannot be launched with PyTorch: {error}") from error
        optimizer = config.optimizer.model_copy(update={"clip_norm": work.gradient_clipping})
        config = config.model_copy(update={"optimizer": optimizer, "data": data})
        if (reason := self.framework(name).unavailable(config)) is not None:
            raise LaunchError(f"{work.name} cannot be launched with {self.name}/{name}: {reason}")
        anew = "it saves no state: a new start begins from the first batch"
        # There are no checkpoints: NEWEST only removes the files of an earlier start.
        return launch_worker(
            f"{self.name}/{name}",
            config,
            device=work.device,
            notes=[anew, ignored_note(work.strategy), *notes],
            checkpoint=NEWEST,
            stoppable=True,
        )

    def read(self, lines: Iterable[str]) -> PrintedRun:
        return read_run(lines)


def _strategy_for(work: ClusterWork) -> str:
    """Return the strategy with which PyTorch itself runs `work`."""
    strategy = work.strategy
    parallel = [axis for axis in AXES if getattr(strategy.grid, axis) > 1]
    if len(parallel) > 1 or parallel == ["row"]:
        raise LaunchError(
            f"{work.name} cuts the work along {' and '.join(parallel)}, and PyTorch is run with data, inter or col "
            "parallelism alone; set the other axes to 1"
        )
    if strategy.optimizer == "offloaded" or (strategy.optimizer == "sharded" and parallel != ["data"]):
        raise LaunchError(
            f"PyTorch's optimizer is run on the device, or sharded over replicas, and {work.name} wants "
            f"'{strategy.optimizer}'; set optimizer: device"
        )
    if parallel == ["data"]:
        return "fully-shard" if strategy.optimizer == "sharded" else "ddp"
    if parallel == ["inter"]:
        return _pipelining_for(strategy.schedule)
    return "tensor" if parallel else "loop"


def _pipelining_for(schedule: ScheduleSpec) -> str:
    kinds = {name: kind for name, kind in PyTorchAdapter.strategies.items() if issubclass(kind, TorchPipelining)}
    for name, kind in kinds.items():
        if kind.recorded == schedule:
            return name
    raise LaunchError(
        f"PyTorch has no schedule '{schedule.name}' of {schedule.chunks} chunks per stage placed in a "
        f"{schedule.placement}; set schedule to one of: {'; '.join(str(kind.recorded) for kind in kinds.values())}"
    )
