"""The points of an experiment file as work for a cluster, as `Adapter.launch` is given it, and records of its runs."""

from __future__ import annotations

from axonn.config import GPTConfig, ModelConfig
from axonn.errors import LaunchError
from axonn.perf.strategy import Strategy
from axonn.records import Asked, Failure, Machine, Ran, Record
from experiments.datasets import Case, DataSet
from experiments.definition import PredictedPanel, PredictedPoint, find_machine, load_model, strategy_of
from experiments.framework import ClusterWork, PrintedRun
from experiments.runner import tflops_formula

PUBLISHED_STEPS = 11
"""The papers' policy: 11 batches, mean of the last 10."""
CLIP_NORM = 1.0
"""Largest norm of the gradient where it is clipped: Megatron-LM's default."""


def cluster_work(
    panel: PredictedPanel, point: PredictedPoint, *, steps: int = PUBLISHED_STEPS, data: str | None = None
) -> ClusterWork:
    """What `point` of `panel` trains, on the panel's machine.

    `data`: see `ClusterWork`. Raises `LaunchError` for a U-Net, which no baseline trains, and `ConfigError` for a
    strategy or a name that does not exist, or a grid that does not have the point's GPUs.
    """
    name = f"{point.model}-{point.gpus}"
    model = _gpt(name, load_model(point.model))
    strategy = strategy_of(panel, point, where=f"panel on {panel.machine}")
    return _work(
        name,
        model=model,
        strategy=strategy,
        batch_size=panel.batch_size,
        gpus=point.gpus,
        machine=panel.machine,
        steps=steps,
        data=data,
    )


def case_work(published: DataSet, case: Case, *, steps: int = PUBLISHED_STEPS, data: str | None = None) -> ClusterWork:
    """What a point of a published data set trains, on the set's machine; the rest is as of `cluster_work`."""
    name = f"{published.name}: {case.label}"
    model = _gpt(name, case.model)
    strategy = case.checked(published.name)
    return _work(
        name,
        model=model,
        strategy=strategy,
        batch_size=case.batch_size,
        gpus=case.gpus,
        machine=published.machine,
        steps=steps,
        data=data,
    )


def _gpt(name: str, model: ModelConfig) -> GPTConfig:
    if not isinstance(model, GPTConfig):
        raise LaunchError(f"{name}: the baselines train GPTs, and {model.name} is none; choose a GPT point")
    return model


def _work(
    name: str,
    *,
    model: GPTConfig,
    strategy: Strategy,
    batch_size: int,
    gpus: int,
    machine: str,
    steps: int,
    data: str | None,
) -> ClusterWork:
    grid = strategy.grid
    ranks = grid.data * grid.inter * grid.row * grid.col
    if ranks != gpus:
        raise LaunchError(f"{name}: the grid has {ranks} ranks for {gpus} GPUs")
    return ClusterWork(
        name=name,
        model=model,
        strategy=strategy,
        batch_size=batch_size,
        steps=steps,
        gpus=gpus,
        gpus_per_node=find_machine(machine).node.gpus.number,
        gradient_clipping=CLIP_NORM if strategy.clip_norm else None,
        data=data,
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
) -> Record:
    """The record of a run on a cluster, from what it printed: a failure unless all its iterations are there.

    The batch time is the mean over the iterations after the first `warmup`, as published times are.
    """
    strategy = work.strategy
    failure = run.failure
    if failure is None and len(run.seconds) < work.steps:
        end = "it ended by itself" if run.finished else "its output stops there"
        failure = Failure(cause="error", detail=f"{len(run.seconds)} of {work.steps} iterations, {end}")
    timed = run.seconds[warmup:]
    if failure is None and not timed:
        failure = Failure(cause="error", detail=f"no iteration but the {warmup} that warm up")
    time = sum(timed) / len(timed) if failure is None else None
    asked = Asked.of(work.model, gpus=work.gpus, batch_size=work.batch_size, precision=strategy.compute)
    recompute = strategy.recompute == "full"
    rate = None if time is None else asked.flops(recompute=recompute) / time / work.gpus / 1e12
    return Record(
        kind="measured",
        experiment=experiment,
        point=work.name,
        asked=asked,
        ran=Ran(
            framework=framework,
            version=version,
            grid=strategy.grid,
            microbatch_size=strategy.microbatch_size,
            schedule=strategy.schedule,
            microbatches=strategy.microbatches(work.batch_size),
        ),
        machine=machine,
        source=source,
        batch_time_s=time,
        batch_times_s=list(run.seconds),
        warmup_batches=warmup,
        losses=list(run.losses),
        memory_bytes=run.memory_bytes,
        tflops_per_gpu=rate if recompute else None,
        tflops_per_gpu_without_recompute=None if recompute else rate,
        tflops_formula=None if rate is None else tflops_formula(work.model, recompute=recompute),
        failure=failure,
    )
