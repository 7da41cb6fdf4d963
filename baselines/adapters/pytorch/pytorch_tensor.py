"""PyTorch's own tensor parallelism (`parallelize_module` on DTensor), which is one-dimensional.

The plan is that of PyTorch's tutorial "Large Scale Transformer model training with Tensor Parallel", without sequence
parallelism: QKV and FC1 by column, projection and FC2 by row, head by column with `loss_parallel`, so that the logits
are never gathered. Two things are chosen for speed: Q, K and V are one layer, its rows in the order of the heads, where
three layers would reduce the gradient of their common input three times; norms and positions stay plain tensors. The
embedding is cut by row as in the tutorial, or whole on every rank: which of the two is faster depends on the link.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.utils._python_dispatch import TorchDispatchMode

from axonn.config.train_config import TrainConfig
from axonn.distributed.collectives import Call, CallKind
from axonn.distributed.runtime import Runtime
from axonn.errors import GridError
from axonn.models.gpt.gpt_model import GPT
from axonn.schedules import ScheduleSpec
from axonn.spans import SpanRecorder
from axonn.training.framework import InProcessFramework
from baselines.adapters.adapter_common import DEVICE, Batches, gpt_of, make_optimizer, unsupported
from baselines.adapters.plain import build
from baselines.ranks import plain_gpt


def plan_of(layer: nn.Module, *, cut_embedding: bool) -> dict[str, ParallelStyle]:
    """Return the parallel styles of a layer's modules."""
    if isinstance(layer, plain_gpt.PlainAttention):
        return {"qkv": ColwiseParallel(), "projection": RowwiseParallel()}
    if isinstance(layer, plain_gpt.PlainFeedForward):
        return {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    if isinstance(layer, plain_gpt.PlainHead):
        return {"output": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    return {"tokens": RowwiseParallel(input_layouts=Replicate())} if cut_embedding else {}


class TorchTensorParallelTrainer:
    """The same model from the same initial weights, sharded by PyTorch along one axis of `ranks` ranks."""

    def __init__(
        self, config: TrainConfig, ranks: int, *, cut_embedding: bool = True, device: torch.device = DEVICE
    ) -> None:
        mesh = init_device_mesh(device.type, (ranks,))
        self._device = device
        self._size = config.microbatch_size
        self._microbatches = config.batch_size // config.microbatch_size
        self._batches = Batches(config, device)
        self._chain = build(config).to(device)
        for layer in self._chain.values():
            # Every rank has the same weights already.
            parallelize_module(layer, mesh, plan_of(layer, cut_embedding=cut_embedding), src_data_rank=None)
        parameters = list(self._chain.parameters())
        # A fused step takes either kind of tensor, not both at once.
        self._optimizers = [
            make_optimizer([p for p in parameters if isinstance(p, DTensor) == cut], config) for cut in (True, False)
        ]

    def layers(self) -> dict[str, nn.Module]:
        return dict(self._chain.items())

    def train_batch(self, step: int) -> float:
        inputs, targets = self._batches(step)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for x, y in plain_gpt.microbatches(inputs, targets, self._size):
            for layer in self._chain.values():
                x = layer(x)  # noqa: PLW2901
            with loss_parallel():
                loss = F.cross_entropy(x.flatten(0, 1), y.flatten()) / self._microbatches
                torch.autograd.backward(loss)
            assert isinstance(loss, DTensor)
            total += loss.to_local().detach()
        for optimizer in self._optimizers:
            optimizer.step()
        return float(total)


class CountedCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counter of the collectives that PyTorch issues inside the block for this thread's DTensors over all `ranks`.

    Raises `NotImplementedError` for a collective that it does not know, since nothing may go uncounted.
    """

    KINDS: Mapping[str, CallKind] = {"sum": "all-reduce sum", "max": "all-reduce max"}
    SENDS_NOTHING = ("wait_tensor", "_wrap_tensor_autograd")

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Call] = Counter()
        self._ranks = tuple(ranks)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            # DTensor dispatches its operations on local tensors, which then arrive here.
            return NotImplemented
        library, _, name = func._schema.name.partition("::")
        if "c10d" in library and name not in self.SENDS_NOTHING:
            names = [argument.name for argument in func._schema.arguments]
            arguments = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            if name not in ("all_reduce", "all_reduce_"):
                raise NotImplementedError(f"{name} is not counted yet")
            tensor = arguments["input"]
            dtype = str(tensor.dtype).removeprefix("torch.")
            kind = self.KINDS[arguments["reduce_op"]]
            self.calls[Call(kind, ("col",), self._ranks, tensor.numel(), dtype, tensor.element_size())] += 1
        return func(*args, **(kwargs or {}))


class TorchTensorParallel(InProcessFramework):
    """Tensor parallelism of DTensors, one-dimensional."""

    label = "PyTorch tensor parallel"
    cut_embedding: ClassVar[bool] = True

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self, config: TrainConfig) -> str | None:
        grid = config.grid
        if grid.col < 2 or grid.size > grid.col:
            return "PyTorch's tensor parallelism is run with G_col only here, at least 2; set the other axes to 1"
        if (reason := unsupported(config, schedule=self.schedule(config))) is not None:
            return reason
        model = gpt_of(config)
        if model.tied_head:
            return "PyTorch's plans do not tie an embedding to a head; untie the head"
        try:
            GPT(model).check(grid)
        except GridError as error:
            return str(error)
        return None

    def schedule(self, config: TrainConfig) -> ScheduleSpec | None:
        return None

    @contextmanager
    def trainer(
        self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None
    ) -> Iterator[TorchTensorParallelTrainer]:
        yield TorchTensorParallelTrainer(
            config, config.grid.col, cut_embedding=self.cut_embedding, device=runtime.device
        )


class TorchTensorParallelWholeEmbedding(TorchTensorParallel):
    """Tensor parallelism of DTensors with an unsharded embedding.

    The embedding sends nothing, and each rank updates all of it.
    """

    label = "PyTorch tensor parallel, embedding whole"
    cut_embedding: ClassVar[bool] = False
