"""Gradients accumulated in place are those of autograd, and no option of a layer gets lost."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from axonn.tensor.gradient_accumulation import WeightGradients
from axonn.tensor.in_place import accumulate_in_place

Make = Callable[[], nn.Module]


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.tokens(x))
        return logits


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def floats(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


def tokens(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, 7, shape)


LAYERS: dict[str, tuple[Make, Callable[[], torch.Tensor]]] = {
    "linear": (lambda: nn.Linear(4, 3), floats(2, 5, 4)),
    "linear of a vector": (lambda: nn.Linear(4, 3), floats(4)),
    "linear without bias": (lambda: nn.Linear(4, 3, False), floats(6, 4)),
    "linear, weight frozen": (lambda: frozen(nn.Linear(4, 3), "weight"), floats(2, 5, 4)),
    "linear, bias frozen": (lambda: frozen(nn.Linear(4, 3), "bias"), floats(2, 5, 4)),
    "linear, all frozen": (lambda: frozen(nn.Linear(4, 3), "weight", "bias"), floats(2, 5, 4)),
    "two linears": (lambda: nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)), floats(5, 4)),
    "one linear twice": (lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2), floats(5, 4)),
    "embedding": (lambda: nn.Embedding(7, 4), tokens(2, 5)),
    "embedding, frozen": (lambda: nn.Sequential(frozen(nn.Embedding(7, 4), "weight"), nn.Linear(4, 2)), tokens(2, 5)),
    "embedding with padding": (lambda: nn.Embedding(7, 4, padding_idx=2), tokens(4, 5)),
    "embedding with a scale": (lambda: nn.Embedding(7, 4, scale_grad_by_freq=True), tokens(4, 5)),
    "tied": (Tied, tokens(3, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("buffered", [False, True], ids=["fresh", "into a buffer"])
def test_gradients_are_those_of_autograd(name: str, buffered: bool) -> None:
    """Over three microbatches, into fresh gradients or into views of one buffer, which stay these views."""
    make, inputs = LAYERS[name]
    torch.manual_seed(0)
    theirs = make().double()
    ours = accumulate_in_place(copy.deepcopy(theirs))
    trainable = [p for p in ours.parameters() if p.requires_grad]
    buffer = torch.zeros(sum(p.numel() for p in trainable), dtype=torch.float64)
    if buffered:
        for parameter, view in zip(trainable, buffer.split([p.numel() for p in trainable]), strict=True):
            parameter.grad = view.view_as(parameter)
    for _ in range(3):
        x = inputs()
        mine, other = x.clone(), x.clone()
        if x.is_floating_point():
            mine.requires_grad_()
            other.requires_grad_()
        y, reference = ours(mine), theirs(other)
        assert torch.equal(y, reference)
        if not reference.requires_grad:
            continue
        weights = torch.randn_like(reference)
        (y * weights).sum().backward()
        (reference * weights).sum().backward()
        if x.is_floating_point():
            assert mine.grad is not None
            assert other.grad is not None
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-13, atol=1e-14)
    for (parameter_name, parameter), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, parameter_name
        assert reference.grad is not None
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-13, atol=1e-14)
        assert parameter.grad.abs().max() > 0
        if buffered:
            assert parameter.grad.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_the_gradient_of_an_input_that_needs_none_is_not_computed() -> None:
    layer = accumulate_in_place(nn.Linear(4, 3))
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.get_parameter("weight").grad is not None


def test_no_gradients_are_kept_without_them() -> None:
    layer = accumulate_in_place(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)))
    with torch.no_grad():
        assert not layer(torch.tensor([1, 2])).requires_grad
    assert all(p.grad is None for p in layer.parameters())


def test_options_are_not_swallowed() -> None:
    layers = accumulate_in_place(nn.ModuleDict({"plain": nn.Linear(3, 2, False), "biased": nn.Linear(3, 2)}))
    assert dict(layers.named_parameters()).keys() == {"plain.weight", "biased.weight", "biased.bias"}
    assert layers["plain"].bias is None


def test_embeddings_with_options_are_left_alone() -> None:
    options = [{"padding_idx": 1}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
    for option in options:
        layer = nn.Embedding(7, 4, **option)  # type: ignore[arg-type]
        accumulate_in_place(layer)
        assert "forward" not in vars(layer), option
    assert "forward" in vars(accumulate_in_place(nn.Embedding(7, 4)))


def test_the_padding_row_gets_no_gradient() -> None:
    layer = accumulate_in_place(nn.Embedding(7, 4, padding_idx=1))
    layer(torch.tensor([1, 1, 3])).sum().backward()
    gradient = layer.get_parameter("weight").grad
    assert gradient is not None
    assert gradient.sum(1).tolist() == [0, 0, 0, 4, 0, 0, 0]


class OwnLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_subclasses_are_left_alone() -> None:
    layer = OwnLinear(3, 2)
    x = torch.randn(4, 3)
    before = layer(x)
    assert torch.equal(accumulate_in_place(layer)(x), before)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("name", ["two linears", "embedding", "tied", "one linear twice"])
def test_the_second_half_can_come_later(name: str) -> None:
    """Deferred, nothing is added until the queue is run; then the gradients are the same bits."""
    make, inputs = LAYERS[name]
    torch.manual_seed(0)
    at_once = make().double()
    queue = WeightGradients()
    split = accumulate_in_place(copy.deepcopy(at_once), queue)
    accumulate_in_place(at_once)
    halves = []
    for _ in range(3):
        x = inputs()
        at_once(x).sum().backward()
        queue.deferring = True
        split(x).sum().backward()
        queue.deferring = False
        halves.append(queue.take())
        assert all(p.grad is None for p in split.parameters())
    queue.take()()
    assert all(p.grad is None for p in split.parameters())
    for second_half in halves:
        second_half()
    for one, other in zip(at_once.parameters(), split.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("name", ["two linears", "embedding", "tied"])
def test_half_precision_adds_up_in_single(name: str) -> None:
    """Gradients of type float32 get what a thousand small microbatches add, which bfloat16 would lose."""
    make, inputs = LAYERS[name]
    torch.manual_seed(0)
    module = accumulate_in_place(make().to(torch.bfloat16))
    for parameter in module.parameters():
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros(parameter.shape)
    x = inputs()
    x = x.to(torch.bfloat16) if x.is_floating_point() else x
    module(x).sum().backward()
    once = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    for _ in range(999):
        module(x).sum().backward()
    for parameter, gradient in zip(module.parameters(), once, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.allclose(parameter.grad, 1000 * gradient, rtol=1e-4)


def test_a_module_that_splits_its_own_backward_gets_the_queue() -> None:
    class Own(nn.Module):
        weight_gradients: WeightGradients | None = None

    queue = WeightGradients()
    module = nn.Sequential(Own(), nn.Linear(2, 2))
    accumulate_in_place(module, queue)
    assert module[0].weight_gradients is queue
