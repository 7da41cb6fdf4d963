"""Collectives are waited for only after what can be computed meanwhile has been started: the order on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from axonn.distributed.collectives import CollectiveGroup, CollectiveHandle, Collectives, Operation
from axonn.grid import Axis, ProcessGrid
from axonn.tensor import (
    TRANSPOSED,
    Conv2d,
    GroupNorm,
    LayerNorm,
    Linear,
    MultiheadAttention,
    RMSNorm,
    TensorContext,
)
from axonn.tensor.gradient_accumulation import WeightGradients
from axonn.tensor.in_place import accumulate_in_place

GRID = ProcessGrid(row=2, col=2)
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "convolution", "convolution_backward")


class Log(TorchDispatchMode):
    """What a rank does while this is entered, in order: "product", and "compute" for all else; a collective's "start"
    and "wait". In a lane each entry is followed by the number of the lane."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[str] = []
        self.lane: Callable[[], int | None] = lambda: None

    def add(self, entry: str) -> None:
        lane = self.lane()
        self.entries.append(entry if lane is None else f"{entry} {lane}")

    def without_other_computation(self) -> list[str]:
        return [entry for entry in self.entries if not entry.startswith("compute")]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        self.add("product" if name in PRODUCTS else "compute")
        return function(*args, **(kwargs or {}))


class LoggedCollectives(Collectives):
    """One rank's collectives, which no other rank takes part in; sums are of zeros."""

    def __init__(self, log: Log) -> None:
        super().__init__(GRID, 0)
        self._log = log

    def _group(self, ranks: tuple[int, ...], axes: Sequence[Axis] | None) -> Any:
        return None

    def _all_reduce(self, tensor: torch.Tensor, group: CollectiveGroup, operation: Operation) -> CollectiveHandle:
        self._log.add("start")
        return _LoggedWork(self._log)

    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: CollectiveGroup) -> CollectiveHandle:
        self._log.add("start")
        output.copy_(tensor.reshape(1, *tensor.shape).expand(output.shape))
        return _LoggedWork(self._log)


class _LoggedWork(CollectiveHandle):
    def __init__(self, log: Log) -> None:
        self._log = log

    def wait(self) -> None:
        self._log.add("wait")


class Rank:
    """Rank 0 of the grid, with its log."""

    def __init__(self) -> None:
        self.log = Log()
        self.context = TensorContext(GRID, 0, LoggedCollectives(self.log))
        self.log.lane = lambda: self.context.lanes.lane

    def build(self, make: Callable[..., nn.Module], *, in_place: bool = False) -> nn.Module:
        layer = make(context=self.context)
        for parameter in layer.parameters():
            nn.init.ones_(parameter)
        return accumulate_in_place(layer, WeightGradients()) if in_place else layer


def backward_of(make: Callable[..., nn.Module], shape: tuple[int, ...], *, in_place: bool) -> Log:
    """What the backward does for its input and its parameters."""
    rank = Rank()
    layer = rank.build(make, in_place=in_place)
    y = layer(torch.ones(shape, requires_grad=True))
    gradient = torch.ones_like(y)
    if in_place:
        y.backward(gradient, retain_graph=True)  # Gradients are there, to be added to.
    rank.log.entries.clear()
    with rank.log:
        y.backward(gradient)
    return rank.log


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(partial(Linear, 8, 4), (3, 4)), (partial(Conv2d, 8, 4, 3), (2, 4, 5, 5))],
    ids=["linear", "conv2d"],
)
def test_the_weight_gradient_is_computed_under_the_all_reduce_of_the_input_gradient(
    make: Callable[..., nn.Module], shape: tuple[int, ...], in_place: bool
) -> None:
    found = backward_of(make, shape, in_place=in_place).without_other_computation()
    assert found == ["product", "start", "product", "wait"]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (partial(LayerNorm, 8), (3, 4)),
        (partial(RMSNorm, 8), (3, 4)),
        (partial(GroupNorm, 1, 8), (3, 4, 5)),
    ],
    ids=["layer norm", "rms norm", "group norm"],
)
def test_norms_compute_the_gradients_of_their_parameters_under_the_reduction(
    make: Callable[..., nn.Module], shape: tuple[int, ...]
) -> None:
    entries = backward_of(make, shape, in_place=False).entries
    assert entries.count("start") == entries.count("wait") == 1
    assert entries.index("wait") - entries.index("start") > 1


def test_self_attention_is_one_product_before_the_heads_and_one_after() -> None:
    rank = Rank()
    layer = rank.build(partial(MultiheadAttention, 8, 4))
    with rank.log:
        layer(torch.ones(2, 3, 4))
    found = rank.log.without_other_computation()
    assert found[:3] == found[-3:] == ["product", "start", "wait"]
    assert "start" not in found[3:-3]


class TwoLanes:
    """A normal and a transposed layer, whose forward and backward run in two lanes."""

    def __init__(self) -> None:
        self.rank = Rank()
        self.network = nn.Sequential(
            self.rank.build(partial(Linear, 8, 4)), self.rank.build(partial(Linear, 4, 8, layout=TRANSPOSED))
        )
        self.inputs = [torch.ones(3, 4, requires_grad=True) for _ in range(2)]

    def run(self, function: Callable[[int], Any]) -> tuple[list[Any], list[str]]:
        """Results of both lanes, and what they did."""

        def logged(lane: int) -> Any:
            with self.rank.log:  # Modes belong to threads: each lane enters it.
                return function(lane)

        self.rank.log.entries.clear()
        lanes = self.rank.context.lanes
        results = lanes.run([partial(logged, 0), partial(logged, 1)])
        lanes.close()
        return results, self.rank.log.without_other_computation()


# What lane 0 has started is waited for only after lane 1 has started its own product; and so on, layer by layer.
FORWARD = [
    *("product 0", "start 0", "product 1", "start 1"),
    *("wait 0", "product 0", "start 0", "wait 1", "product 1", "start 1"),
    *("wait 0", "wait 1"),
]
BACKWARD = [
    *("product 0", "start 0", "product 0", "product 1", "start 1", "product 1"),
    *("wait 0", "product 0", "start 0", "product 0", "wait 1", "product 1", "start 1", "product 1"),
    *("wait 0", "wait 1"),
]


def test_one_lane_computes_while_the_others_collective_is_under_way() -> None:
    lanes = TwoLanes()
    outputs, forward = lanes.run(lambda lane: lanes.network(lanes.inputs[lane]))
    assert forward == FORWARD
    _, backward = lanes.run(lambda lane: outputs[lane].backward(torch.ones_like(outputs[lane])))
    assert backward == BACKWARD


def test_so_it_does_in_a_recomputation() -> None:
    lanes = TwoLanes()
    outputs, forward = lanes.run(
        lambda lane: checkpoint(lanes.network, lanes.inputs[lane], use_reentrant=False, preserve_rng_state=False)
    )
    assert forward == FORWARD
    _, backward = lanes.run(lambda lane: outputs[lane].backward(torch.ones_like(outputs[lane])))
    # A lane begins its backward where its recomputation ends, having waited for the last sum of that.
    begins = ["wait 0", *BACKWARD[:3], "wait 1", *BACKWARD[3:6]]
    assert backward == FORWARD[:-2] + begins + BACKWARD[6:]
