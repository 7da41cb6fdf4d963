"""Task: PyTorch's `fully_shard` on one rank, its parameters and optimizer in host memory (CPUOffloadPolicy)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from axonn.config.train_config import TrainConfig, validate
from baselines.adapters.adapter_common import gpt_of, lone_process_group, make_optimizer
from baselines.gpu.tasks.task_common import allocated, peak_since_reset, reset_peak, timed_batches, tokens_of
from baselines.ranks import plain_gpt


def offloaded_module(config: TrainConfig, device: torch.device) -> nn.Sequential:
    """Return the plain GPT in float32 on the host, computing in the configured type on `device`, sharded layer by
    layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    dtype = getattr(torch, config.precision.compute)
    names = plain_gpt.layer_names(config.model)
    module = nn.Sequential(*(plain_gpt.build(name, config.model, None, torch.float32) for name in names))
    mesh = init_device_mesh(device.type, (1,))
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda"),
    }
    for layer in module:
        fully_shard(layer, **settings)
    fully_shard(module, **settings)
    return module


class OffloadedReplica:
    """The offloaded module with its optimizer, and the most bytes that its batches took on a GPU."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._device = device
        self._size = config.microbatch_size
        self._module: Any = offloaded_module(config, device)
        self._optimizer = make_optimizer(self._module.parameters(), config)
        self.batch_peak = 0
        self.step_peak = 0

    def train(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Train one batch and return its mean loss."""
        self._optimizer.zero_grad()
        total = torch.zeros((), device=self._device)
        reset_peak(self._device)
        microbatches = list(plain_gpt.microbatches(inputs, targets, self._size))
        for number, (x, y) in enumerate(microbatches, start=1):
            # Gradients go to the host once a batch, as a user who wants speed has it.
            self._module.set_requires_gradient_sync(number == len(microbatches))
            loss = plain_gpt.loss_of(self._module(x), y) / len(microbatches)
            torch.autograd.backward(loss)
            total += loss.detach()
        self.batch_peak = max(self.batch_peak, peak_since_reset(self._device) or 0)
        reset_peak(self._device)
        self._optimizer.step()
        mean = float(total)
        self.step_peak = max(self.step_peak, peak_since_reset(self._device) or 0)
        return mean


def run(
    *, device: torch.device, seconds: float, config: Mapping[str, Any], warmup: int, batches: int
) -> dict[str, Any]:
    """Return `memory` in bytes (after_init, step_peak, batch_peak on a GPU) and `times`. Weights are torch's own."""
    wanted = validate(dict(config), TrainConfig, where="task")
    model = gpt_of(wanted)
    deadline = time.monotonic() + seconds
    with lone_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"):
        replica = OffloadedReplica(wanted, device)
        memory: dict[str, int] = {}
        if (after := allocated(device)) is not None:
            memory["after_init"] = after

        def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, targets = tokens_of(model, wanted.batch_size, step)
            return inputs.to(device), targets.to(device)

        times, losses = timed_batches(
            replica.train, batch_of, device=device, warmup=warmup, batches=batches, deadline=deadline
        )
        if device.type == "cuda":
            memory |= {
                "step_peak": replica.step_peak,
                "batch_peak": max(replica.batch_peak, replica.step_peak),
            }
        return {"memory": memory, "times": times, "losses": losses, "torch": torch.__version__}
