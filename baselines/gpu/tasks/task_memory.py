"""Tasks: device memory of one GPT under our engine, by category; and whether a GPT can be trained at all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from axonn.config.train_config import TrainConfig, validate
from axonn.device.streams import Timeline
from axonn.distributed.collectives import SerialCollectives
from axonn.grid import ProcessGrid
from axonn.inter_layer.stage import StageChunk, parameter_specs, virtual_spans
from axonn.models.gpt.gpt_model import GPT
from axonn.models.initialization import Constant, Initial
from axonn.optim.model_optimizer import ModelOptimizer
from axonn.schedules import ChunkLayout
from axonn.tensor import TensorContext
from baselines.adapters.adapter_common import gpt_of
from baselines.gpu.peaks import wait_for
from baselines.gpu.tasks.task_common import (
    allocated,
    engine_of,
    free_cache,
    peak_since_reset,
    reset_peak,
    timed_batches,
    tokens_of,
)

ON_DEVICE = ("parameters", "gradients", "optimizer_state", "buckets")


class QuickGPT(GPT):
    """A GPT that begins with constants, which are made at once: for memory and for time, not for training."""

    def initial(self, name: str) -> Initial:
        initial = super().initial(name)
        return initial if isinstance(initial, Constant) else Constant(0.01)


def state_alone(config: TrainConfig, device: torch.device) -> dict[str, int]:
    """Make model state as the engine makes it, and run one step of its optimizer without a pipeline.

    Returns after_init and step_peak on a GPU, and the bytes of its tensors by category anywhere.
    """
    before = allocated(device)
    model = QuickGPT(gpt_of(config))
    grid = ProcessGrid()
    layout = ChunkLayout(stages=1)
    spans = virtual_spans(model, layout)
    context = TensorContext.serial(seed=config.seed)
    dtype = getattr(torch, config.precision.compute)
    chunks = [StageChunk(model, spans[0], context=context, dtype=dtype, device=torch.device("meta"))]
    specs = parameter_specs(model, chunks, spans, layout)

    def initialise(name: str, part: torch.Tensor) -> None:
        initial = model.initial(name)
        assert isinstance(initial, Constant)
        part.fill_(initial.value)

    optimizer = ModelOptimizer(
        specs,
        grid=grid,
        rank=0,
        collectives=SerialCollectives(grid, 0),
        config=config.optimizer,
        precision=config.precision,
        initialise=initialise,
        timeline=Timeline(device, None),
        steps=config.steps,
    )
    after = allocated(device)
    memory = dict(optimizer.memory()._asdict())
    optimizer.zero()
    reset_peak(device)
    optimizer.step(0)
    peak = peak_since_reset(device)
    if before is not None and after is not None and peak is not None:
        memory |= {"after_init": after - before, "step_peak": peak - before}
    else:
        memory |= {"after_init": sum(memory[name] for name in ON_DEVICE)}
    return memory


def run(
    *, device: torch.device, seconds: float, config: Mapping[str, Any], warmup: int, batches: int
) -> dict[str, Any]:
    """Return `memory` in bytes by category, and `times`, seconds of each batch."""
    deadline = time.monotonic() + seconds
    wanted = validate(dict(config), TrainConfig, where="task")
    model = gpt_of(wanted)
    memory = state_alone(wanted, device)
    free_cache(device)
    # Real weights: a GPU draws less power, and runs faster, on values that are all the same.
    engine = engine_of(GPT(model), wanted, device)
    reset_peak(device)
    times, losses = timed_batches(
        lambda inputs, targets: engine.train_batch(inputs, targets).loss,
        lambda step: tokens_of(model, wanted.batch_size, step),
        device=device,
        warmup=warmup,
        batches=batches,
        deadline=deadline,
    )
    memory |= {name: size for name, size in engine.memory().items() if name not in memory}
    if (peak := peak_since_reset(device)) is not None:
        memory["batch_peak"] = peak
    return {"memory": memory, "times": times, "losses": losses}


def fits(*, device: torch.device, seconds: float, config: Mapping[str, Any]) -> dict[str, Any]:
    """Train two batches of a GPT; running out of memory is the failure of the task. Returns `seconds` of the second
    batch."""
    wanted = validate(dict(config), TrainConfig, where="task")
    model = gpt_of(wanted)
    engine = engine_of(QuickGPT(model), wanted, device)
    reset_peak(device)
    taken = 0.0
    for step in range(2):
        inputs, targets = tokens_of(model, wanted.batch_size, step)
        start = time.perf_counter()
        engine.train_batch(inputs, targets)
        wait_for(device)
        taken = time.perf_counter() - start
    return {"seconds": taken, "memory": engine.memory(), "batch_peak": peak_since_reset(device)}
