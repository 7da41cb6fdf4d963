"""Weights, data and optimizer that all baselines share, so that they differ from our engine in the framework alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

from axonn.config.train_config import FloatType, LearningRateConfig, PrecisionConfig, TrainConfig
from axonn.data.text import TextData
from axonn.device.devices import on_device
from axonn.errors import LaunchError
from axonn.inter_layer.stage import StageChunk, initialise
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.gpt.gpt_model import GPT
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.schedules import ScheduleSpec
from axonn.tensor import TensorContext
from baselines.ranks.mixed import HALF, MixedAdamW

DEVICE = torch.device("cpu")


EXACT: tuple[FloatType, ...] = ("float32", "float64")
_MASTER: dict[FloatType, FloatType] = {
    name: "float64" if name == "float64" else "float32" for name in get_args(FloatType)
}
"""Type of the optimizer's master weights, by the compute type."""


def gpt_of(config: TrainConfig) -> GPTConfig:
    """Return the GPT that `config` trains. Raises `LaunchError` for another model, which no baseline trains."""
    if not isinstance(config.model, GPTConfig):
        raise LaunchError(f"the baselines train GPTs, and {config.model.name} is none")
    return config.model


def unsupported(
    config: TrainConfig, *, schedule: ScheduleSpec | None, precisions: Sequence[FloatType] = EXACT
) -> str | None:
    """Return what `config` asks for that no baseline supports, and what to change; None where there is nothing.

    `schedule`: the pipeline schedule of this framework; `precisions`: the types that it computes in.
    """
    try:
        model = gpt_of(config)
    except LaunchError as error:
        return str(error)
    optimizer, precision = config.optimizer, config.precision
    # Our engine's schedule, the default, stands for whatever the framework has.
    other_schedule = config.grid.inter > 1 and config.schedule not in (ScheduleSpec(), schedule)
    asked = {
        f"schedule {config.schedule.name} as it is configured": other_schedule,
        f"optimizer.name {optimizer.name}": optimizer.name != "adamw",
        "optimizer.placement offloaded": optimizer.placement != "device",
        "data.held_out": config.data.held_out > 0,
        "evaluation": config.evaluation is not None,
        "checkpoints": config.checkpoints is not None,
        "overdecomposition": config.overdecomposition not in (None, 1),
        f"master weights in {precision.master_type}": precision.master not in (None, _MASTER[precision.compute]),
        "precision.loss_scale": precision.scaling not in (1.0, PrecisionConfig(compute=precision.compute).scaling),
        "dropout": model.dropout > 0 or model.attention_dropout > 0,
        "optimizer.clip_norm": optimizer.clip_norm is not None,
        "optimizer.schedule": optimizer.schedule != LearningRateConfig(),
        "activation_checkpointing": config.activation_checkpointing is not None,
        "initial_weights": config.initial_weights is not None,
        f"precision {precision.compute}": precision.compute not in precisions,
        f"gradients in {precision.gradient_type}": precision.gradient_type != precision.compute,
    }
    lacking = [name for name, is_asked in asked.items() if is_asked]
    return f"the baselines do without {', '.join(lacking)}; remove that, or compare without it" if lacking else None


class Optimizer(Protocol):
    """The part of an optimizer that a training loop calls."""

    def zero_grad(self) -> None: ...

    def step(self) -> object: ...


def adamw_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the configured AdamW as arguments of `torch.optim.AdamW`. Raises `LaunchError` for another optimizer."""
    o = config.optimizer
    if not isinstance(o, AdamWConfig):
        raise LaunchError(f"the baselines train with AdamW, not {o.name}; remove optimizer.name")
    return {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Return the configured AdamW, fused, as in our engine."""
    return torch.optim.AdamW(parameters, fused=True, **adamw_settings(config))


def optimizer_of(module: nn.Module, config: TrainConfig) -> Optimizer:
    """Return the configured AdamW, with float32 masters for half-precision parameters, as in our engine."""
    if getattr(torch, config.precision.compute) in HALF:
        return MixedAdamW(module.parameters(), **adamw_settings(config))
    return make_optimizer(module.parameters(), config)


@contextmanager
def lone_process_group(backend: str) -> Iterator[None]:
    """Give this process a group of its own, which some of PyTorch's wrappers need even for a single rank."""
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def loss_of(model: GPT) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the loss function of `model`, called with complete outputs and targets."""
    return partial(model.loss, context=TensorContext.serial())


class Layers(StageChunk):
    """A chunk of our engine's layers with its initial weights: one tensor in, one tensor out."""

    def __init__(self, model: GPT, span: range, config: TrainConfig, *, device: torch.device = DEVICE) -> None:
        context = TensorContext.serial(seed=config.seed)
        super().__init__(model, span, context=context, dtype=getattr(torch, config.precision.compute), device=device)
        initialise(model, self, seed=config.seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (y,) = super().forward(x)
        return y


def layers_of(chunks: Iterable[StageChunk]) -> dict[str, nn.Module]:
    """Return the modules of all layers of `chunks` by name."""
    return {name: layer for chunk in chunks for name, layer in chunk.chain.items()}


class Batches:
    """The batches that our engine trains on, on `device`."""

    def __init__(self, config: TrainConfig, device: torch.device = DEVICE) -> None:
        self._size = config.batch_size
        self._device = device
        model = gpt_of(config)
        self._data = TextData(config.data.path, seq_len=model.seq_len, vocab=model.vocab, seed=config.seed)

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets [batch_size, seq_len] of batch number `step`."""
        first = step * self._size
        inputs, targets = self._data.batch(range(first, first + self._size))
        return on_device(inputs, self._device), on_device(targets, self._device)
