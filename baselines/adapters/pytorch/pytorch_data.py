"""PyTorch's own data parallelism: `DistributedDataParallel` and `fully_shard` around a model in plain modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from axonn.config.train_config import TrainConfig
from axonn.distributed.runtime import Runtime
from axonn.models.gpt.gpt_model import GPT
from axonn.schedules import ScheduleSpec
from axonn.spans import SpanRecorder
from axonn.training.framework import InProcessFramework
from baselines.adapters.adapter_common import DEVICE, Batches, gpt_of, make_optimizer, unsupported
from baselines.adapters.plain import build
from baselines.ranks import plain_gpt


class ReplicaTrainer(ABC):
    """One of `config.grid.data` replicas: gradients accumulate over its microbatches and are reduced by the last."""

    def __init__(self, config: TrainConfig, rank: int, device: torch.device = DEVICE) -> None:
        self._rank = rank
        self._device = device
        self._replicas = config.grid.data
        self._rows = config.batch_size // self._replicas
        self._size = config.microbatch_size
        self._gpt = GPT(gpt_of(config))
        self._batches = Batches(config, device)
        self._chain = build(config).to(device)
        self._model = self.wrap(nn.Sequential(*self._chain.values()))
        self._optimizer = make_optimizer(self._model.parameters(), config)

    @abstractmethod
    def wrap(self, model: nn.Sequential) -> nn.Module:
        """Return the model with data parallelism applied."""

    @abstractmethod
    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Return the context in which a microbatch runs; only the last one reduces gradients."""

    def layers(self) -> dict[str, nn.Module]:
        return dict(self._chain.items())

    def train_batch(self, step: int) -> float:
        shard = slice(self._rank * self._rows, (self._rank + 1) * self._rows)
        inputs, targets = self._batches(step)
        microbatches = list(plain_gpt.microbatches(inputs[shard], targets[shard], self._size))
        self.zero_gradients()
        total = torch.zeros(1, dtype=torch.float64, device=self._device)
        for number, (x, y) in enumerate(microbatches, start=1):
            with self.microbatch(last=number == len(microbatches)):
                loss = plain_gpt.loss_of(self._model(x), y) / len(microbatches)
                torch.autograd.backward(loss)
            total += loss.detach()
        self._optimizer.step()
        dist.all_reduce(total)
        return float(total) / self._replicas

    def zero_gradients(self) -> None:
        self._optimizer.zero_grad()


class DDPTrainer(ReplicaTrainer):
    """Unsharded replicas; buckets of gradients are all-reduced during the last microbatch's backward."""

    def wrap(self, model: nn.Sequential) -> nn.Module:
        self._replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        return self._replica

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        synchronised: AbstractContextManager[None] = nullcontext() if last else self._replica.no_sync()
        return synchronised

    def zero_gradients(self) -> None:
        # Gradients stay in the buckets, which saves DDP a copy of all of them.
        self._optimizer.zero_grad(set_to_none=False)


class FullyShardTrainer(ReplicaTrainer):
    """Parameters, gradients and optimizer state sharded over the replicas, by transformer layer.

    Nothing is reduced before the last microbatch, and the parameters stay gathered until its backward: the setting that
    sends least, at most memory.
    """

    def wrap(self, model: nn.Sequential) -> nn.Module:
        mesh = init_device_mesh(self._device.type, (self._replicas,))
        blocks: dict[str | int, list[nn.Module]] = {}
        for layer in self._gpt.layers:
            blocks.setdefault(layer.name if layer.block is None else layer.block, []).append(self._chain[layer.name])
        for block in blocks.values():
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        sharded = fully_shard(model, mesh=mesh, reshard_after_forward=False)
        assert isinstance(sharded, FSDPModule)
        self._sharded = sharded
        return model

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        self._sharded.set_requires_gradient_sync(last)
        self._sharded.set_reshard_after_backward(last)
        yield


class TorchDDP(InProcessFramework):
    """DistributedDataParallel: unsharded replicas, one all-reduce of gradients per batch."""

    label = "PyTorch DDP"
    kind: ClassVar[type[ReplicaTrainer]] = DDPTrainer

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self, config: TrainConfig) -> str | None:
        grid = config.grid
        if grid.data < 2 or grid.inter * grid.tensor > 1:
            return f"{self.label} is data parallelism: set G_data to at least 2 and the other axes to 1"
        if (reason := unsupported(config, schedule=self.schedule(config))) is not None:
            return reason
        if gpt_of(config).tied_head:
            return "the plain modules do not tie an embedding to a head; untie the head"
        if config.batch_size % (grid.data * config.microbatch_size):
            return (
                f"batch_size {config.batch_size} is no multiple of G_data x microbatch_size = "
                f"{grid.data * config.microbatch_size}; change one of them"
            )
        return None

    def schedule(self, config: TrainConfig) -> ScheduleSpec | None:
        return None

    @contextmanager
    def trainer(self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None) -> Iterator[ReplicaTrainer]:
        yield self.kind(config, runtime.rank, runtime.device)


class TorchFullyShard(TorchDDP):
    """fully_shard (FSDP2): parameters, gradients and optimizer state sharded over the replicas."""

    label = "PyTorch fully_shard"
    kind = FullyShardTrainer
