"""Task: throughput of a diffusion U-Net under our engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from axonn.config.train_config import TrainConfig, validate
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.models.registry import make_model
from axonn.models.unet.unet_config import UNetConfig
from baselines.gpu.peaks import wait_for


def noisy_images(model: UNetConfig, rows: int, step: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return random inputs (images and time steps) and targets: throughput does not depend on their values."""
    drawn = torch.Generator().manual_seed(step)
    shape = (rows, model.channels, model.image_size, model.image_size)
    images, noise = (torch.randn(shape, generator=drawn) for _ in range(2))
    return (images, torch.randint(model.noise_steps, (rows,), generator=drawn)), noise


def run(
    *, device: torch.device, seconds: float, config: Mapping[str, Any], warmup: int, batches: int
) -> dict[str, Any]:
    """Return `times` of the batches after those that warm up, and all `losses`."""
    wanted = validate(dict(config), TrainConfig, where="task")
    assert isinstance(wanted.model, UNetConfig)
    began = time.monotonic()
    engine = Engine(
        make_model(wanted.model),
        grid=ProcessGrid(),
        batch_size=wanted.batch_size,
        microbatch_size=wanted.microbatch_size,
        optimizer=wanted.optimizer,
        precision=wanted.precision,
        device=device,
        seed=wanted.seed,
        steps=wanted.steps,
    )
    times, losses = [], []
    for step in range(warmup + batches):
        inputs, targets = noisy_images(wanted.model, wanted.batch_size, step)
        wait_for(device)
        start = time.perf_counter()
        losses.append(engine.train_batch(inputs, targets).loss)
        wait_for(device)
        if step >= warmup:
            times.append(time.perf_counter() - start)
            if time.monotonic() - began > seconds:
                break
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"times": times, "losses": losses, "peak": peak}
