"""megatron-core on one rank: its GPT with tensor, pipeline and data parallelism."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if not TYPE_CHECKING:
    # A script imports its neighbours by their plain names.
    import no_gpu
    import plain_gpt
    import rank_common
    from mixed import HALF, MixedAdamW
else:
    from baselines.ranks import no_gpu, plain_gpt, rank_common
    from baselines.ranks.mixed import HALF, MixedAdamW

SHARDED = "data-distributed-optimizer"
"""The strategy that is its distributed optimizer."""
BUCKET = 5_000_000
"""Elements of a bucket of gradients: its own default of 40 million would leave nothing to overlap in a model of a size
that is trained without a GPU."""
LAYER = {
    "input_layernorm": "attention{}.norm",
    "self_attention.linear_qkv": "attention{}.qkv",
    "self_attention.linear_proj": "attention{}.projection",
    "pre_mlp_layernorm": "mlp{}.norm",
    "mlp.linear_fc1": "mlp{}.fc1",
    "mlp.linear_fc2": "mlp{}.fc2",
}
"""Our names of the modules of a transformer layer."""
OTHERS = {
    "embedding.word_embeddings": "embedding.tokens",
    "embedding.position_embeddings": "embedding.positions",
    "decoder.final_layernorm": "head.norm",
    "output_layer": "head.output",
}


def our_name(name: str, chunk: Any) -> str:
    """Return our name of a parameter of a chunk of its GPT, whose layers are counted from 0 in each chunk."""
    module, _, kind = name.rpartition(".")
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", module)
    if match is None:
        return f"{OTHERS[module]}.{kind}"
    number = chunk.decoder.layers[int(match[1])].layer_number - 1
    return f"{LAYER[match[2]].format(number)}.{kind}"


def load(chunk: nn.Module, work: rank_common.RankWork, rank: int) -> int:
    """Load our initial weights, each parameter's shard for tensor-parallel rank `rank`.

    Returns the number of values of the unsharded parameters.
    """
    parts = work.grid["col"]
    count = 0
    weights = work.weights()
    for name, parameter in chunk.named_parameters():
        ours = our_name(name, chunk)
        value = weights[ours]
        count += value.numel()
        if ".qkv." in ours:
            value = plain_gpt.by_head(value, work.model.heads)
        for dim, size in enumerate(parameter.shape):
            if size != value.shape[dim]:
                value = torch.unflatten(value, dim, (parts, size)).select(dim, rank)
        # Raises for a shape other than ours.
        parameter.data.copy_(value.reshape(parameter.shape))
    return count


def check_parameters(work: rank_common.RankWork, count: int) -> None:
    """Raise `RuntimeError` unless its stages have all of our parameters, each once, and no others.

    `count`: the number of values on this rank's stage.
    """
    total = torch.tensor([count])
    torch.distributed.all_reduce(total)
    copies = work.grid["data"] * work.grid["col"]
    ours = sum(weight.numel() for weight in work.weights().values())
    if int(total) != ours * copies:
        raise RuntimeError(f"megatron-core's GPT has {int(total) // copies} parameters, ours has {ours}")


def settings(work: rank_common.RankWork, chunks: int) -> Any:
    """Return its configuration of the model and of its parallelism."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    m, grid = work.model, work.grid
    on_gpu = work.device.type == "cuda"
    return TransformerConfig(
        num_layers=m.layers,
        hidden_size=m.hidden,
        num_attention_heads=m.heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Exact GELU: its fused form is the approximation by tanh.
        bias_activation_fusion=False,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        params_dtype=work.dtype,
        bf16=work.dtype == torch.bfloat16,
        pipeline_dtype=work.dtype,
        tensor_model_parallel_size=grid["col"],
        pipeline_model_parallel_size=grid["inter"],
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        # As recommended: its interleaved schedule overlaps messages with compute, each message by itself.
        overlap_p2p_comm=chunks > 1,
        batch_p2p_comm=chunks == 1,
        # Without a stream for ordering, outputs in transit would be freed before they are sent.
        deallocate_pipeline_outputs=on_gpu or chunks == 1,
    )


def build(work: rank_common.RankWork, config: Any, chunks: int) -> list[Any]:
    """Build this rank's chunks of the GPT, with our initial weights."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    m = work.model
    models = []
    count = 0
    for chunk in range(chunks):
        stage = chunk if chunks > 1 else None
        models.append(
            GPTModel(
                config,
                get_gpt_layer_local_spec(),
                vocab_size=m.vocab,
                max_sequence_length=m.seq_len,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                share_embeddings_and_output_weights=False,
                vp_stage=stage,
                # Its norms are made in float32, and would pass float32 to products of a half type.
            ).to(work.device, work.dtype)
        )
        count += load(models[-1], work, parallel_state.get_tensor_model_parallel_rank())
    check_parameters(work, count)
    return models


def replicate(work: rank_common.RankWork, config: Any, chunks: list[Any]) -> list[Any]:
    """Return the chunks with its data parallelism: gradients are reduced bucket by bucket during the last microbatch's
    backward."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    sharded = work.strategy == SHARDED
    replication = DistributedDataParallelConfig(
        overlap_grad_reduce=True,
        use_distributed_optimizer=sharded,
        overlap_param_gather=sharded,
        bucket_size=BUCKET,
    )
    replicated = [DistributedDataParallel(config, replication, chunk) for chunk in chunks]
    config.no_sync_func = replicated[0].no_sync
    config.finalize_model_grads_func = finalize_model_grads
    return replicated


class PlainOptimizer:
    """PyTorch's fused AdamW on this rank's parameters, with float32 masters where they are of a half type."""

    def __init__(self, work: rank_common.RankWork, models: list[Any]) -> None:
        self._models = models
        self._parameters = [p for model in models for p in model.parameters()]
        self._adam = (
            MixedAdamW(self._parameters, **work.adamw)
            if work.dtype in HALF
            else torch.optim.AdamW(self._parameters, fused=True, **work.adamw)
        )

    def zero_grad(self) -> None:
        self._adam.zero_grad()

    def step(self) -> None:
        for parameter in self._parameters:
            # The buffer in which its data parallelism accumulates the gradient.
            if (gradient := getattr(parameter, "main_grad", None)) is not None:
                parameter.grad = gradient
        self._adam.step()


def sharded_optimizer(work: rank_common.RankWork, models: list[Any]) -> Any:
    """Return its optimizer, whose state is sharded over the replicas."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    o = work.optimizer
    asked = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.betas[0],
        adam_beta2=o.betas[1],
        adam_eps=o.eps,
        clip_grad=0.0,
        params_dtype=work.dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=True,
    )
    # By default biases and norms do not decay.
    return get_megatron_optimizer(asked, models, config_overrides={})


def initialise(work: rank_common.RankWork, chunks: int) -> None:
    """Initialise its process groups and random generators, on a machine without a GPU behind stand-ins for one."""
    without_gpu = work.device.type == "cpu"
    if without_gpu:
        no_gpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if without_gpu:
        no_gpu.install_in_megatron()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=work.grid["col"],
        pipeline_model_parallel_size=work.grid["inter"],
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
    )
    model_parallel_cuda_manual_seed(work.seed)


def forward_step(work: rank_common.RankWork) -> Callable[[Iterator[tuple[torch.Tensor, torch.Tensor]], Any], Any]:
    """Return the function that its schedules call for each microbatch: its losses, and the function of their mean."""
    positions = torch.arange(work.model.seq_len, device=work.device).unsqueeze(0)

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = losses.mean()
        # A copy: the schedule divides the loss in place.
        return loss, loss.detach().clone()

    def forward(data: Iterator[tuple[torch.Tensor, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
        tokens, targets = next(data)
        return model(tokens, positions, None, labels=targets), mean

    return forward


def set_up(work: rank_common.RankWork) -> rank_common.Train:
    chunks = max(work.config["schedule"]["chunks"], 2) if work.strategy == "interleaved" else 1
    initialise(work, chunks)
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config = settings(work, chunks)
    models = build(work, config, chunks)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if replicas > 1:
        models = replicate(work, config, models)
    optimizer = sharded_optimizer(work, models) if work.strategy == SHARDED else PlainOptimizer(work, models)
    forward_backward = get_forward_backward_func()
    forward = forward_step(work)

    def train(step: int) -> float:
        optimizer.zero_grad()
        if replicas > 1:
            for model in models:
                model.zero_grad_buffer()
        microbatches = list(plain_gpt.microbatches(*work.batch(step, replica, replicas), work.microbatch_size))
        losses = forward_backward(
            forward_step_func=forward,
            data_iterator=[iter(microbatches) for _ in models] if chunks > 1 else iter(microbatches),
            model=models if chunks > 1 else models[0],
            num_microbatches=len(microbatches),
            seq_length=work.model.seq_len,
            micro_batch_size=work.microbatch_size,
            forward_only=False,
        )
        optimizer.step()
        # Only ranks of the last stage have losses, one for each microbatch.
        return rank_common.mean_over_ranks(work.grid["inter"] * float(sum(losses)) / len(microbatches))

    return train


if __name__ == "__main__":
    rank_common.main(set_up)
