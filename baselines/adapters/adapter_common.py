"""What all baselines share, so that they differ from our engine only in the framework: weights, data, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, get_args

import torch
from torch import nn

from axonn.config.train_config import FloatType, LearningRateConfig, PrecisionConfig, TrainConfig
from axonn.data.text import TextData
from axonn.device.devices import on_device
from axonn.inter_layer.stage import StageChunk, initialise
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.gpt.gpt_model import GPT
from axonn.schedules import ScheduleSpec
from axonn.tensor import TensorContext
from baselines.ranks.mixed import HALF, MixedAdamW

DEVICE = torch.device("cpu")


EXACT: tuple[FloatType, ...] = ("float32", "float64")
_MASTER: dict[FloatType, FloatType] = {
    name: "float64" if name == "float64" else "float32" for name in get_args(FloatType)
}
"""Type of the weights that the optimizer keeps, by the type that is computed in."""


def beyond(
    config: TrainConfig, *, schedule: ScheduleSpec | None, precisions: Sequence[FloatType] = EXACT
) -> str | None:
    """What `config` asks for that no baseline does, and what to change; None when there is nothing. `schedule` and
    `precisions`: the pipeline schedule that this one has, and the types that it computes in."""
    if not isinstance(config.model, GPTConfig):
        return f"the baselines train GPTs, and {config.model.name} is none"
    optimizer, precision, model = config.optimizer, config.precision, config.model
    # That of our engine, the default, stands for whatever the framework has.
    scheduled = config.grid.inter > 1 and config.schedule not in (ScheduleSpec(), schedule)
    asked = {
        f"schedule {config.schedule.name} as it is configured": scheduled,
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
    found = [name for name, is_asked in asked.items() if is_asked]
    return f"the baselines do without {', '.join(found)}; remove that, or compare without it" if found else None


class Optimizer(Protocol):
    """What a training loop asks of one."""

    def zero_grad(self) -> None: ...

    def step(self) -> object: ...


def adamw_settings(config: TrainConfig) -> dict[str, Any]:
    """The configured AdamW, as `torch.optim.AdamW` takes it."""
    o = config.optimizer
    return {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The configured AdamW, fused, as our engine uses it."""
    return torch.optim.AdamW(parameters, fused=True, **adamw_settings(config))


def optimizer_of(module: nn.Module, config: TrainConfig) -> Optimizer:
    """The configured AdamW; of half-precision parameters with float32 masters, as in our engine."""
    if getattr(torch, config.precision.compute) in HALF:
        return MixedAdamW(module.parameters(), **adamw_settings(config))
    return make_optimizer(module.parameters(), config)


def loss_of(model: GPT) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Its loss of whole outputs and targets."""
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
    """The modules of all layers of these chunks, by name."""
    return {name: layer for chunk in chunks for name, layer in chunk.chain.items()}


class Batches:
    """The batches that our engine trains on, on `device`."""

    def __init__(self, config: TrainConfig, device: torch.device = DEVICE) -> None:
        self._size = config.batch_size
        self._device = device
        self._data = TextData(
            config.data.path, seq_len=config.model.seq_len, vocab=config.model.vocab, seed=config.seed
        )

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets [batch_size, seq_len] of batch number `step`."""
        first = step * self._size
        inputs, targets = self._data.batch(range(first, first + self._size))
        return on_device(inputs, self._device), on_device(targets, self._device)
