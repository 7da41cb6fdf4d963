"""Task: PyTorch's `fully_shard` on one rank, its parameters and optimizer in host memory (CPUOffloadPolicy)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from axonn.config.train_config import TrainConfig, validate
from baselines.adapters.adapter_common import adamw_settings
from baselines.gpu.peaks import wait_for
from baselines.gpu.tasks.task_memory import allocated, peak_since_reset, reset_peak, tokens_of
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


def run(
    *, device: torch.device, seconds: float, config: Mapping[str, Any], warmup: int, batches: int
) -> dict[str, Any]:
    """Return `memory` in bytes (after_init, step_peak, batch_peak on a GPU) and `times`. Weights are torch's own."""
    wanted = validate(dict(config), TrainConfig, where="task")
    began = time.monotonic()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        module: Any = offloaded_module(wanted, device)
        optimizer = torch.optim.AdamW(module.parameters(), fused=True, **adamw_settings(wanted))
        memory: dict[str, int] = {}
        if (after := allocated(device)) is not None:
            memory["after_init"] = after
        times: list[float] = []
        losses: list[float] = []
        step_peak = 0
        batch_peak = 0
        size = wanted.microbatch_size
        microbatches = wanted.batch_size // size
        for step in range(warmup + batches):
            inputs, targets = (t.to(device) for t in tokens_of(wanted.model, wanted.batch_size, step))
            wait_for(device)
            start = time.perf_counter()
            optimizer.zero_grad()
            total = torch.zeros((), device=device)
            reset_peak(device)
            for number, (x, y) in enumerate(zip(inputs.split(size), targets.split(size), strict=True)):
                # Gradients go to the host once a batch, as a user who wants speed has it.
                module.set_requires_gradient_sync(number == microbatches - 1)
                loss = plain_gpt.loss_of(module(x), y) / microbatches
                loss.backward()
                total += loss.detach()
            if (peak := peak_since_reset(device)) is not None:
                batch_peak = max(batch_peak, peak)
                reset_peak(device)
            optimizer.step()
            losses.append(float(total))
            wait_for(device)
            if (peak := peak_since_reset(device)) is not None:
                step_peak = max(step_peak, peak)
            if step >= warmup:
                times.append(time.perf_counter() - start)
                if time.monotonic() - began > seconds:
                    break
        if device.type == "cuda":
            memory |= {"step_peak": step_peak, "batch_peak": max(batch_peak, step_peak)}
        return {"memory": memory, "times": times, "losses": losses, "torch": torch.__version__}
    finally:
        dist.destroy_process_group()
