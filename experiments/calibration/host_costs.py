"""Host costs: the time of the suite's engine on small models, minus the time of their kernels."""

from __future__ import annotations

from statistics import quantiles
from typing import Any

import torch

from axonn.config.train_config import FloatType, PrecisionConfig, TrainConfig
from axonn.distributed.runtime import Runtime, connect
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import outline_of
from axonn.perf.machine.machine_file import HostTimes, MachineFile
from axonn.perf.machine.quantities import Time
from axonn.perf.planner.engine_strategy import strategy_of_config
from axonn.perf.timing.stage_times import stage_times
from axonn.perf.timing.update_times import step_times
from axonn.spans import SpanKind, SpanRecorder

_LAYERS = (2, 6)
_MICROBATCHES = 4
_ROWS = 2
_WARM_UP = 3


def small(layers: int, precision: FloatType) -> TrainConfig:
    """Return a training run with a large share of host time; its sizes are points of the grids of kernels."""
    model = GPTConfig(name=f"small-{layers}", layers=layers, hidden=64, heads=2, seq_len=64, vocab=256)
    return TrainConfig(
        model=model,
        batch_size=_MICROBATCHES * _ROWS,
        microbatch_size=_ROWS,
        precision=PrecisionConfig(compute=precision, loss_scale=1.0),
    )


def measure(precision: FloatType, *, batches: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Return the seconds of a forward, of a backward and of a batch of each model, on a single rank."""
    from axonn.training.engine_framework import EngineTrainer

    seconds = {}
    for layers in _LAYERS:
        with connect(ProcessGrid(), device=device) as runtime:
            spans = SpanRecorder(0)
            trainer = EngineTrainer(small(layers, precision), runtime, spans)
            batch_seconds = []
            for step in range(batches + _WARM_UP):
                if step == _WARM_UP:
                    spans.spans.clear()
                start = spans.now()
                trainer.train_batch(step)
                batch_seconds.append(spans.now() - start)
        tasks = {
            name: _undisturbed([s.end - s.start for s in spans.spans if s.kind == kind])
            for name, kind in (("forward", SpanKind.FORWARD), ("backward", SpanKind.BACKWARD))
        }
        seconds[str(layers)] = {**tasks, "batch": _undisturbed(batch_seconds[_WARM_UP:])}
    return seconds


def measure_pipelined(precision: FloatType, runtime: Runtime, *, stages: int, batches: int) -> float:
    """Return this rank's seconds between the spans of one task and the next in a pipeline of several stages: to receive
    messages, to choose a task, to send. Every rank of the pipeline calls it."""
    from axonn.training.engine_framework import EngineTrainer

    config = small(2 * stages, precision).model_copy(update={"grid": ProcessGrid(inter=stages)})
    spans = SpanRecorder(runtime.rank)
    trainer = EngineTrainer(config, runtime, spans)
    gaps = []
    for step in range(batches + _WARM_UP):
        spans.spans.clear()
        start = spans.now()
        trainer.train_batch(step)
        batch_seconds = spans.now() - start
        explained = sum(s.end - s.start for s in spans.spans if s.kind != SpanKind.SEND)
        gaps.append((batch_seconds - explained) / (2 * _MICROBATCHES))
    return _undisturbed(gaps[_WARM_UP:])


def _undisturbed(seconds: list[float]) -> float:
    """Return the lower quartile: other work on the machine only adds time."""
    return quantiles(seconds, n=4)[0]


def host_times(machine: MachineFile, precision: FloatType, measured: dict[str, Any], *, source: str) -> HostTimes:
    """Return the host times: measured times minus those of the kernels, which `machine` (without host times) predicts.

    The difference between the two models gives the time of an operation, the smaller one the rest of a task and of a
    batch.
    """
    few, many = _LAYERS
    kernels = {layers: _predicted(machine, layers, precision) for layers in _LAYERS}
    counts = {layers: _operations(machine, layers, precision) for layers in _LAYERS}
    per_operation, rest = {}, []
    for way in ("forward", "backward"):
        more = measured[str(many)][way] - measured[str(few)][way] - kernels[many][way] + kernels[few][way]
        per_operation[way] = max(0.0, more / (counts[many][way] - counts[few][way]))
        rest.append(measured[str(few)][way] - kernels[few][way] - counts[few][way] * per_operation[way])
    task = max(0.0, sum(rest) / 2)
    one = measured[str(few)]
    batch = one["batch"] - _MICROBATCHES * (one["forward"] + one["backward"]) - kernels[few]["step"]

    def quantity(seconds: float) -> Time:
        # A quantity is positive; a time lost in noise counts as one hundredth of a microsecond.
        return Time(value=round(max(0.01, 1e6 * seconds), 2), unit="us", source=source, status="measured")

    return HostTimes(
        forward=quantity(per_operation["forward"]),
        backward=quantity(per_operation["backward"]),
        task=quantity(task),
        batch=quantity(batch),
    )


def _predicted(machine: MachineFile, layers: int, precision: FloatType) -> dict[str, float]:
    config = small(layers, precision)
    strategy, outline = strategy_of_config(config), outline_of(config.model)
    (stage,) = stage_times(outline, machine, strategy)
    return {"forward": stage.forward, "backward": stage.backward, "step": sum(step_times(outline, machine, strategy))}


def _operations(machine: MachineFile, layers: int, precision: FloatType) -> dict[str, float]:
    """Return how many operations count in a forward and in a backward: the delay, in seconds, if each took one second
    more on the host."""
    second = Time(value=1.0, unit="s", source="", status="assumed")
    host = HostTimes(forward=second, backward=second, task=second, batch=second)
    slow = machine.model_copy(update={"gpu": machine.gpu.model_copy(update={"host": host})})
    with_host, without = _predicted(slow, layers, precision), _predicted(machine, layers, precision)
    return {way: with_host[way] - without[way] for way in ("forward", "backward")}
