"""DeepSpeed on one rank: ZeRO by stage, with or without the optimizer offloaded, or its pipeline engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if not TYPE_CHECKING:
    # A script imports its neighbours by their plain names.
    import deepspeed_build
    import plain_gpt
    import rank_common
else:
    from baselines.ranks import deepspeed_build, plain_gpt, rank_common

BUCKETS = {"cpu": 500_000, "cuda": 50_000_000}
"""Elements that are reduced at a time.

DeepSpeed's default, 500 million, is more than the models measured here have, so that nothing would be reduced before
the backward pass is over, and on a GPU its two buffers of that size would be most of the memory. On 2 busy cores 500
thousand was no slower than more, within noise, and took a tenth less memory than 5 million.
"""


def adamw(work: rank_common.RankWork, module: nn.Module, offloaded: bool) -> torch.optim.Optimizer:
    """Return the configured AdamW: DeepSpeed's own where its state is offloaded, as ZeRO-Offload demands, otherwise
    torch's fused one, as for every other framework here."""
    settings = work.adamw
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(module.parameters(), adamw_mode=True, **settings)
        return optimizer
    return torch.optim.AdamW(module.parameters(), fused=True, **settings)


def initialise(work: rank_common.RankWork, module: nn.Module, *, replicas: int, zero: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine; `zero` is the section `zero_optimization` of its configuration."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=module.parameters(),
        optimizer=adamw(work, module, offloaded="offload_optimizer" in zero),
        config={
            "train_micro_batch_size_per_gpu": work.microbatch_size,
            "gradient_accumulation_steps": work.batch_size // work.microbatch_size // replicas,
            # Its default clips at 1.
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            # Float32 masters; gradients accumulate in the type of the parameters.
            "bf16": {"enabled": work.dtype == torch.bfloat16},
        },
        dist_init_required=False,
    )
    return engine


def zero_settings(strategy: str, device: str) -> dict[str, Any]:
    """Return `zero_optimization` of "zero-STAGE" or "zero-STAGE-offload"."""
    stage = int(strategy.removeprefix("zero-")[0])
    settings: dict[str, Any] = {
        "stage": stage,
        # Gradients are copied into a buffer as they come, and reduced while the backward pass goes on.
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": BUCKETS[device],
    }
    if strategy.endswith("-offload"):
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    return settings


def whole_model(work: rank_common.RankWork) -> nn.Sequential:
    """Return all layers, on the rank's device."""
    weights = work.weights()
    layers = (plain_gpt.build(name, work.model, weights, work.dtype) for name in plain_gpt.layer_names(work.model))
    return nn.Sequential(*layers).to(work.device)


def zero(work: rank_common.RankWork) -> rank_common.Train:
    """Set up data parallelism with optimizer state, gradients and parameters sharded over the replicas, by stage."""
    settings = zero_settings(work.strategy, work.device.type)
    engine = initialise(work, whole_model(work), replicas=work.ranks, zero=settings)
    size = work.microbatch_size

    def train(step: int) -> float:
        inputs, targets = work.batch(step, work.rank, work.ranks)
        losses = []
        for x, y in plain_gpt.microbatches(inputs, targets, size):
            loss = plain_gpt.loss_of(engine(x), y)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return rank_common.mean_over_ranks(torch.stack(losses).mean().item())

    return train


class DeepSpeedStage(nn.Sequential):
    """Some layers, with their weights, as one layer of a `PipelineModule`."""

    def __init__(self, work: rank_common.RankWork, names: list[str]) -> None:
        weights = work.weights(*names)
        super().__init__(*(plain_gpt.build(name, work.model, weights, work.dtype) for name in names))


def pipeline(work: rank_common.RankWork) -> rank_common.Train:
    """Set up its pipeline engine, cut where STAGE_STARTS says (the first layer of each stage); with replicas,
    ZeRO-1."""
    from deepspeed.pipe import LayerSpec, PipelineModule

    # One of its layers is one of our stages, so it cuts where we cut.
    specs = [LayerSpec(DeepSpeedStage, work, names) for names in plain_gpt.stages(work.model)]
    module = PipelineModule(specs, num_stages=len(specs), loss_fn=plain_gpt.loss_of, partition_method="uniform")
    replicas = work.grid["data"]
    engine = initialise(work, module, replicas=replicas, zero={"stage": 1 if replicas > 1 else 0})
    replica = engine.grid.get_data_parallel_id()
    size = work.microbatch_size

    def microbatches(step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        inputs, targets = work.batch(step, replica, replicas)
        yield from plain_gpt.microbatches(inputs, targets, size)

    def train(step: int) -> float:
        return float(engine.train_batch(data_iter=microbatches(step)))

    return train


def set_up(work: rank_common.RankWork) -> rank_common.Train:
    deepspeed_build.find_operators(work.device.type)
    from deepspeed.comm import init_distributed

    backend = "nccl" if work.device.type == "cuda" else "gloo"
    init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return pipeline(work) if work.strategy == "pipeline" else zero(work)


if __name__ == "__main__":
    rank_common.main(set_up)
