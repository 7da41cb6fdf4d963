"""Helpers that the tasks share: device memory, an engine on one rank, and the timing of its batches."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from axonn.config.train_config import TrainConfig
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.models.base import PipelineModel
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.spans import SpanRecorder
from baselines.gpu.peaks import wait_for

_Inputs = TypeVar("_Inputs")


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


def free_cache(device: torch.device) -> None:
    """Hand memory that no tensor uses back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def engine_of(
    model: PipelineModel, config: TrainConfig, device: torch.device, *, spans: SpanRecorder | None = None
) -> Engine:
    """Return our engine on one rank."""
    return Engine(
        model,
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


def timed_batches(
    train: Callable[[_Inputs, torch.Tensor], float],
    batch_of: Callable[[int], tuple[_Inputs, torch.Tensor]],
    *,
    device: torch.device,
    warmup: int,
    batches: int,
    deadline: float,
    least: int = 1,
) -> tuple[list[float], list[float]]:
    """Return the seconds of the batches after those that warm up, and the losses of all.

    `batch_of` draws inputs and targets outside of what is timed, `train` returns the loss. Once `least` batches are
    timed, none begins after `deadline`, a value of `time.monotonic`.
    """
    times: list[float] = []
    losses: list[float] = []
    for step in range(warmup + batches):
        inputs, targets = batch_of(step)
        wait_for(device)
        start = time.perf_counter()
        losses.append(train(inputs, targets))
        wait_for(device)
        times.append(time.perf_counter() - start)
        if step >= warmup + least - 1 and time.monotonic() > deadline:
            break
    return times[warmup:], losses
