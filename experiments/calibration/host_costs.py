"""What the host costs: our engine on small models, less what their kernels take by themselves."""

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
    """A training run of which the host takes a good part; its sizes are points of the grids of kernels."""
    model = GPTConfig(name=f"small-{layers}", layers=layers, hidden=64, heads=2, seq_len=64, vocab=256)
    return TrainConfig(
        model=model,
        batch_size=_MICROBATCHES * _ROWS,
        microbatch_size=_ROWS,
        precision=PrecisionConfig(compute=precision, loss_scale=1.0),
    )


def measure(precision: FloatType, *, batches: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of a forward, of a backward and of a batch of each model, on the only rank of this process."""
    from axonn.training.engine_framework import EngineTrainer

    found = {}
    for layers in _LAYERS:
        with connect(ProcessGrid(), device=device) as runtime:
            spans = SpanRecorder(0)
            trainer = EngineTrainer(small(layers, precision), runtime, spans)
            whole = []
            for step in range(batches + _WARM_UP):
                if step == _WARM_UP:
                    spans.spans.clear()
                start = spans.now()
                trainer.train_batch(step)
                whole.append(spans.now() - start)
        of = {
            name: _undisturbed([s.end - s.start for s in spans.spans if s.kind == kind])
            for name, kind in (("forward", SpanKind.FORWARD), ("backward", SpanKind.BACKWARD))
        }
        found[str(layers)] = {**of, "batch": _undisturbed(whole[_WARM_UP:])}
    return found


def measure_pipelined(precision: FloatType, runtime: Runtime, *, stages: int, batches: int) -> float:
    """Seconds between the spans of a task and of the next on a rank of several stages: to hear of messages, to choose,
    to send. Every rank of the pipeline calls it; the result is this rank's."""
    from axonn.training.engine_framework import EngineTrainer

    config = small(2 * stages, precision).model_copy(update={"grid": ProcessGrid(inter=stages)})
    spans = SpanRecorder(runtime.rank)
    trainer = EngineTrainer(config, runtime, spans)
    found = []
    for step in range(batches + _WARM_UP):
        spans.spans.clear()
        start = spans.now()
        trainer.train_batch(step)
        whole = spans.now() - start
        explained = sum(s.end - s.start for s in spans.spans if s.kind != SpanKind.SEND)
        found.append((whole - explained) / (2 * _MICROBATCHES))
    return _undisturbed(found[_WARM_UP:])


def _undisturbed(seconds: list[float]) -> float:
    """The lower quartile: what else runs on the machine only adds."""
    return quantiles(seconds, n=4)[0]


def host_times(machine: MachineFile, precision: FloatType, measured: dict[str, Any], *, source: str) -> HostTimes:
    """What is left of the measured times when the kernels that `machine` (without host times) predicts are taken away.

    The difference between the two models gives the time of an operation, the smaller one what is left of a task, and
    of a batch.
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
        # A quantity is positive; what was lost in noise is one hundredth of a microsecond.
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
    """Times of an operation that a forward and a backward have: by how much one second each delays them."""
    second = Time(value=1.0, unit="s", source="", status="assumed")
    host = HostTimes(forward=second, backward=second, task=second, batch=second)
    slow = machine.model_copy(update={"gpu": machine.gpu.model_copy(update={"host": host})})
    with_host, without = _predicted(slow, layers, precision), _predicted(machine, layers, precision)
    return {way: with_host[way] - without[way] for way in ("forward", "backward")}
