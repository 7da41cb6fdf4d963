"""Task: throughput of a diffusion U-Net under our engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from axonn.config.train_config import TrainConfig, validate
from axonn.models.registry import make_model
from axonn.models.unet.unet_config import UNetConfig
from baselines.gpu.tasks.task_common import engine_of, peak_since_reset, timed_batches


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
    deadline = time.monotonic() + seconds
    wanted = validate(dict(config), TrainConfig, where="task")
    model = wanted.model
    assert isinstance(model, UNetConfig)
    engine = engine_of(make_model(model), wanted, device)
    times, losses = timed_batches(
        lambda inputs, targets: engine.train_batch(inputs, targets).loss,
        lambda step: noisy_images(model, wanted.batch_size, step),
        device=device,
        warmup=warmup,
        batches=batches,
        deadline=deadline,
    )
    return {"times": times, "losses": losses, "peak": peak_since_reset(device)}
