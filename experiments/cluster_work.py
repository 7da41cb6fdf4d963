"""Points of an experiment file as work for a cluster, the argument of `Adapter.launch`, and records of their runs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from axonn.config.train_config import TrainConfig
from axonn.device.devices import DeviceType
from axonn.errors import LaunchError
from axonn.observability.records import Execution, Failure, Machine, Record, Workload, settings_of
from axonn.training.framework import ClusterWork, PrintedRun
from axonn.training.run_record import note_of, time_or_failure
from experiments.definition import find_machine
from experiments.validation.published_sets import Case

PUBLISHED_STEPS = 11
"""The papers' policy: 11 batches, mean of the last 10."""
CLIP_NORM = 1.0
"""Clipping norm of the gradient: Megatron-LM's default."""


@dataclass(frozen=True, kw_only=True)
class SmallWork:
    """A measured run of an experiment, to be done on a cluster. `framework`: as `load_framework` takes it."""

    name: str
    framework: str
    config: TrainConfig
    warmup_batches: int

    @property
    def gpus(self) -> int:
        """GPUs: one for each rank."""
        return self.config.grid.size

    @property
    def steps(self) -> int:
        """Number of batches."""
        return self.config.steps


def cluster_work(
    case: Case,
    *,
    machine: str,
    name: str | None = None,
    steps: int = PUBLISHED_STEPS,
    data: str | None = None,
    device: DeviceType = "cuda",
) -> ClusterWork:
    """Return the work of a point on a machine.

    `name`: the point's name in records (default its label). `data` and `device`: see `ClusterWork`. Raises
    `ConfigError` for a strategy or a machine that does not exist, and `LaunchError` for a grid with another number of
    ranks than the point has GPUs.
    """
    name = name or case.label
    strategy = case.checked(name)
    ranks = strategy.grid.size
    if ranks != case.gpus:
        raise LaunchError(f"{name}: the grid has {ranks} ranks for {case.gpus} GPUs")
    return ClusterWork(
        name=name,
        model=case.model,
        strategy=strategy,
        batch_size=case.batch_size,
        steps=steps,
        gpus=case.gpus,
        gpus_per_node=find_machine(machine).node.gpus.number,
        gradient_clipping=CLIP_NORM if strategy.clip_norm else None,
        data=data,
        device=device,
    )


def record_of(
    work: ClusterWork,
    run: PrintedRun,
    *,
    framework: str,
    version: str,
    machine: Machine,
    source: str,
    experiment: str,
    warmup: int = 1,
    new_starts: Collection[int] = (),
) -> Record:
    """Return the record of a run on a cluster, from its output: a failure unless it has all iterations.

    The batch time is the mean over the iterations after the first `warmup`, as published times are; `new_starts`: first
    iterations of starts that resumed the run, which are left out, too.
    """
    strategy = work.strategy
    time, failure = time_or_failure(run.seconds, run.failure or _incomplete(work, run), warmup, new_starts)
    asked = Workload.of(work.model, gpus=work.gpus, batch_size=work.batch_size, precision=strategy.compute)
    recompute = strategy.recompute == "full"
    rate = None if time is None else asked.flops(recompute=recompute) / time / work.gpus / 1e12
    return Record(
        kind="measured",
        experiment=experiment,
        point=work.name,
        asked=asked,
        ran=Execution(
            framework=framework,
            version=version,
            grid=strategy.grid,
            microbatch_size=strategy.microbatch_size,
            schedule=strategy.schedule,
            microbatches=strategy.microbatches(work.batch_size),
            overdecomposition=strategy.overdecomposition,
        ),
        settings=_settings(work),
        machine=machine,
        source=source,
        batch_time_s=time,
        batch_times_s=list(run.seconds),
        warmup_batches=warmup,
        losses=list(run.losses),
        memory_bytes=run.memory_bytes,
        tflops_per_gpu=rate if recompute else None,
        tflops_per_gpu_without_recompute=None if recompute else rate,
        tflops_formula=None if rate is None else work.model.flops_formula(recompute=recompute),
        failure=failure,
        note=note_of(new_starts),
    )


def _incomplete(work: ClusterWork, run: PrintedRun) -> Failure | None:
    """Return the failure of a run that has not all iterations, or None."""
    if len(run.seconds) >= work.steps:
        return None
    end = "it ended by itself" if run.finished else "its output stops there"
    return Failure(cause="error", detail=f"{len(run.seconds)} of {work.steps} iterations, {end}")


def _settings(work: ClusterWork) -> dict[str, Any]:
    return settings_of(
        work.strategy,
        model=work.model,
        batch_size=work.batch_size,
        gpus=work.gpus,
        steps=work.steps,
        gradient_clipping=work.gradient_clipping,
        data=work.data,
    )
