"""Tasks: device memory of one GPT under our engine, by category; and whether a GPT can be trained at all."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any

import torch

from axonn.config.train_config import TrainConfig, validate
from axonn.device.streams import Timeline
from axonn.distributed.collectives import SerialCollectives
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.inter_layer.stage import StageChunk, parameter_specs, virtual_spans
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.gpt.gpt_model import GPT
from axonn.models.initialization import Constant, Initial
from axonn.optim.model_optimizer import ModelOptimizer
from axonn.schedules import ChunkLayout
from axonn.spans import SpanRecorder
from axonn.tensor import TensorContext
from baselines.gpu.peaks import wait_for

ON_DEVICE = ("parameters", "gradients", "optimizer_state", "buckets")


class QuickGPT(GPT):
    """A GPT that begins with constants, which are made at once: for memory and for time, not for training."""

    def initial(self, name: str) -> Initial:
        found = super().initial(name)
        return found if isinstance(found, Constant) else Constant(0.01)


def allocated(device: torch.device) -> int | None:
    """Return the bytes that tensors take on a GPU now; None on a CPU, where nobody counts them."""
    if device.type != "cuda":
        return None
    wait_for(device)
    gc.collect()
    return torch.cuda.memory_allocated(device)


def peak_since_reset(device: torch.device) -> int | None:
    """Return the most bytes on a GPU since `reset_peak`; None on a CPU."""
    if device.type != "cuda":
        return None
    wait_for(device)
    return torch.cuda.max_memory_allocated(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def state_alone(config: TrainConfig, device: torch.device) -> dict[str, int]:
    """Make model state as the engine makes it, and run one step of its optimizer without a pipeline.

    Returns after_init and step_peak on a GPU, and the bytes of its tensors by category anywhere.
    """
    before = allocated(device)
    model = QuickGPT(config.model)
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
    found = dict(optimizer.memory()._asdict())
    optimizer.zero()
    reset_peak(device)
    optimizer.step(0)
    peak = peak_since_reset(device)
    if before is not None and after is not None and peak is not None:
        found |= {"after_init": after - before, "step_peak": peak - before}
    else:
        found |= {"after_init": sum(found[name] for name in ON_DEVICE)}
    return found


def engine_of(
    config: TrainConfig, device: torch.device, *, spans: SpanRecorder | None = None, quick: bool = True
) -> Engine:
    """On one rank; `quick`: with constants for weights. What is timed beside others has real ones, since a GPU draws
    less power, and runs faster, on values that are all the same."""
    return Engine(
        (QuickGPT if quick else GPT)(config.model),
        grid=ProcessGrid(),
        batch_size=config.batch_size,
        microbatch_size=config.microbatch_size,
        optimizer=config.optimizer,
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        device=device,
        seed=config.seed,
        steps=config.steps,
        spans=spans,
    )


def tokens_of(model: GPTConfig, rows: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random inputs and targets [rows, seq_len]."""
    drawn = torch.randint(model.vocab, (rows, model.seq_len + 1), generator=torch.Generator().manual_seed(step))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def run(
    *, device: torch.device, seconds: float, config: Mapping[str, Any], warmup: int, batches: int
) -> dict[str, Any]:
    """Return `memory` in bytes by category, and `times`, seconds of each batch."""
    began = time.monotonic()
    wanted = validate(dict(config), TrainConfig, where="task")
    memory = state_alone(wanted, device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    engine = engine_of(wanted, device, quick=False)
    times, losses = [], []
    reset_peak(device)
    for step in range(warmup + batches):
        inputs, targets = tokens_of(wanted.model, wanted.batch_size, step)
        wait_for(device)
        start = time.perf_counter()
        losses.append(engine.train_batch(inputs, targets).loss)
        wait_for(device)
        if step >= warmup:
            times.append(time.perf_counter() - start)
            if time.monotonic() - began > seconds:
                break
    memory |= {name: size for name, size in engine.memory().items() if name not in memory}
    if (peak := peak_since_reset(device)) is not None:
        memory["batch_peak"] = peak
    return {"memory": memory, "times": times, "losses": losses}


def fits(*, device: torch.device, seconds: float, config: Mapping[str, Any]) -> dict[str, Any]:
    """Train two batches of a GPT; running out of memory is the failure of the task. Returns `seconds` of the second
    batch."""
    wanted = validate(dict(config), TrainConfig, where="task")
    engine = engine_of(wanted, device)
    reset_peak(device)
    taken = 0.0
    for step in range(2):
        inputs, targets = tokens_of(wanted.model, wanted.batch_size, step)
        start = time.perf_counter()
        engine.train_batch(inputs, targets)
        wait_for(device)
        taken = time.perf_counter() - start
    return {"seconds": taken, "memory": engine.memory(), "batch_peak": peak_since_reset(device)}
