"""The reference implementation on one rank: its pipeline, its data parallelism, or both together."""

from __future__ import annotations

from importlib import import_module
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

if not TYPE_CHECKING:
    # A script imports its neighbours by their plain names.
    import no_gpu
    import plain_gpt
    import rank_common
else:
    from baselines.ranks import no_gpu, plain_gpt, rank_common


class ReferenceStage(nn.Module):
    """The layers of one stage, with the shapes of messages that the reference implementation asks for."""

    def __init__(self, work: rank_common.RankWork, names: list[str]) -> None:
        super().__init__()
        weights = work.weights(*names) if work.written else None
        self._message = [-1, work.model.seq_len, work.model.hidden]
        self._recompute: int | None = work.config["activation_checkpointing"]
        # Its engine computes half types under autocast: the parameters are always float32.
        self.layers = nn.ModuleDict({name: plain_gpt.build(name, work.model, weights, torch.float32) for name in names})

    def get_input_shape(self) -> list[int]:
        """Return the shape of its input; -1 stands for the rows of a microbatch."""
        return self._message

    def get_output_shape(self) -> list[int]:
        return self._message

    def _block(self, name: str) -> int | None:
        """Return which of the segments to be recomputed a layer belongs to; None for a layer in none."""
        number = name.lstrip("abcdefghijklmnopqrstuvwxyz")
        return int(number) // self._recompute if number and self._recompute else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, names in groupby(self.layers, self._block):
            part = nn.Sequential(*(self.layers[name] for name in names))
            x = part(x) if block is None else checkpoint(part, x, use_reentrant=False)
        return x


def without_gpu() -> None:
    """Give it a device and groups where it asks for CUDA and NCCL by name."""
    no_gpu.install()
    make_group = dist.new_group

    def new_group(ranks: list[int], backend: str) -> Any:
        return make_group(ranks=[int(rank) for rank in ranks], backend="gloo" if backend == "nccl" else backend)

    dist.new_group = new_group  # type: ignore[assignment]


def set_up(work: rank_common.RankWork) -> rank_common.Train:
    on_gpu = work.device.type == "cuda"
    if not on_gpu:
        without_gpu()
    # Here `axonn` is the package of PyPI, which a type checker would take for this suite's engine. Its engine's module
    # needs MPI, which it initialises where there is more than one stage.
    ax: Any = import_module("axonn.axonn")
    inter_layer: Any = import_module("axonn.inter_layer")

    stages, replicas = work.grid["inter"], work.grid["data"]
    ax.init(G_inter=stages, G_data=replicas, gpus_per_node=None if on_gpu else 1)
    # Its data loader, which is not used here, would set it.
    ax.config.micro_batch_size = work.microbatch_size
    stage, replica = ax.config.inter_layer_parallel_rank, ax.config.data_parallel_rank
    module = ReferenceStage(work, plain_gpt.stages(work.model)[stage]).to(work.device)
    engine = inter_layer.AxoNN_Inter_Layer_Engine(module, plain_gpt.loss_of, computation_dtype=work.dtype)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True, **work.adamw)

    def train(step: int) -> float:
        inputs, targets = work.batch(step, replica, replicas)
        optimizer.zero_grad()
        loss = engine.forward_backward_optimizer(inputs, targets, optimizer)
        # The last stage of each replica has the loss, the others 0.
        return rank_common.mean_over_ranks(stages * loss)

    return train


def leave() -> None:
    """Finalize MPI: Open MPI takes a rank that leaves without this for one that failed."""
    from mpi4py import MPI

    if MPI.Is_initialized():
        MPI.Finalize()


if __name__ == "__main__":
    rank_common.main(set_up, leave)
