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

from axonn.collectives import Call, CallKind
from axonn.config import GPTConfig, ScheduleConfig, TrainConfig
from axonn.errors import GridError
from axonn.grid import ProcessGrid
from axonn.models.gpt import GPT
from axonn.runtime import Runtime
from axonn.trace import SpanRecorder
from baselines.common import DEVICE, Batches, Layers, beyond, make_optimizer


class Embedding(nn.Module):
    """As `axonn.models.gpt.Embedding`, as the other layers here are as those there: same parameters, plain modules."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.hidden)
        self.positions = nn.Embedding(config.seq_len, config.hidden)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return embedded


class Attention(nn.Module):
    """The rows of `qkv` are those of one head after the other, so that a part of them is whole heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.width = config.hidden // config.heads
        self.norm = nn.LayerNorm(config.hidden)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.projection = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv: torch.Tensor = self.qkv(self.norm(x))
        # As many heads as this rank has.
        q, k, v = qkv.view(*qkv.shape[:2], -1, 3, self.width).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: torch.Tensor = self.projection(y.transpose(1, 2).flatten(2))
        return x + projected


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden)
        self.fc1 = nn.Linear(config.hidden, 4 * config.hidden)
        self.fc2 = nn.Linear(4 * config.hidden, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fed: torch.Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return x + fed


class Head(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden)
        self.output = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(self.norm(x))
        return logits


def plan_of(layer: nn.Module, *, cut_embedding: bool) -> dict[str, ParallelStyle]:
    """How the parts of a layer are cut."""
    if isinstance(layer, Attention):
        return {"qkv": ColwiseParallel(), "projection": RowwiseParallel()}
    if isinstance(layer, FeedForward):
        return {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    if isinstance(layer, Head):
        return {"output": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    return {"tokens": RowwiseParallel(input_layouts=Replicate())} if cut_embedding else {}


def build(config: TrainConfig) -> nn.ModuleDict:
    """The layers by name, whole, with the initial weights of all frameworks."""
    model = config.model
    kinds: dict[str, type[nn.Module]] = {
        "Embedding": Embedding,
        "Attention": Attention,
        "FeedForward": FeedForward,
        "Head": Head,
    }
    gpt = GPT(model)
    source = Layers(gpt, range(len(gpt.layers)), config).chain
    chain = nn.ModuleDict()
    for name, layer in source.items():
        chain[name] = kinds[type(layer).__name__](model).to(getattr(torch, config.precision.compute))
        values = layer.state_dict()
        if "qkv.weight" in values:
            for part in ("qkv.weight", "qkv.bias"):
                by_head = values[part].unflatten(0, (3, model.heads, -1)).transpose(0, 1)
                values[part] = by_head.flatten(0, 2)
        chain[name].load_state_dict(values)
    return chain


class TorchTensorParallelTrainer:
    """The same model from the same initial weights, cut by PyTorch along one axis of `ranks` ranks."""

    def __init__(self, config: TrainConfig, ranks: int, *, cut_embedding: bool = True) -> None:
        mesh = init_device_mesh(DEVICE.type, (ranks,))
        self._size = config.microbatch_size
        self._microbatches = config.batch_size // config.microbatch_size
        self._batches = Batches(config)
        self._chain = build(config)
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
        total = 0.0
        for x, y in zip(inputs.split(self._size), targets.split(self._size), strict=True):
            for layer in self._chain.values():
                x = layer(x)  # noqa: PLW2901
            with loss_parallel():
                loss = F.cross_entropy(x.flatten(0, 1), y.flatten()) / self._microbatches
                loss.backward()
            assert isinstance(loss, DTensor)
            total += loss.to_local().item()
        for optimizer in self._optimizers:
            optimizer.step()
        return total


class CountedCollectives(TorchDispatchMode):
    """Counts, inside of the block, the collectives that PyTorch issues for this thread's DTensors over all `ranks`.

    Raises `NotImplementedError` for one that it does not know, since nothing may go uncounted.
    """

    KINDS: Mapping[str, CallKind] = {"sum": "all-reduce sum", "max": "all-reduce max"}
    SENDS_NOTHING = ("wait_tensor", "_wrap_tensor_autograd")

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self._ranks = tuple(ranks)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            # What it does to the local tensors comes here by itself.
            return NotImplemented
        library, _, name = func._schema.name.partition("::")
        if "c10d" in library and name not in self.SENDS_NOTHING:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            if name not in ("all_reduce", "all_reduce_"):
                raise NotImplementedError(f"{name} is not counted yet")
            tensor = given["input"]
            dtype = str(tensor.dtype).removeprefix("torch.")
            kind = self.KINDS[given["reduce_op"]]
            self.calls[Call(kind, ("col",), self._ranks, tensor.numel(), dtype, tensor.element_size())] += 1
        return func(*args, **(kwargs or {}))


class TorchTensorParallel:
    """Its one axis is that of the columns."""

    label = "PyTorch tensor parallel"
    cut_embedding: ClassVar[bool] = True

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def unavailable(self, config: TrainConfig) -> str | None:
        grid = ProcessGrid(**config.grid.model_dump())
        if grid.col < 2 or grid.size > grid.col:
            return "PyTorch's tensor parallelism is run with G_col only here, at least 2; set the other axes to 1"
        if config.model.tied_head:
            return "PyTorch's plans do not tie an embedding to a head; untie the head"
        try:
            GPT(config.model).check(grid)
        except GridError as error:
            return str(error)
        return beyond(config)

    def schedule(self, config: TrainConfig) -> ScheduleConfig | None:
        return None

    @contextmanager
    def trainer(
        self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None
    ) -> Iterator[TorchTensorParallelTrainer]:
        yield TorchTensorParallelTrainer(config, config.grid.col, cut_embedding=self.cut_embedding)


class TorchTensorParallelWholeEmbedding(TorchTensorParallel):
    """Sends nothing for the embedding, and each rank updates the whole of it."""

    label = "PyTorch tensor parallel, embedding whole"
    cut_embedding: ClassVar[bool] = False
