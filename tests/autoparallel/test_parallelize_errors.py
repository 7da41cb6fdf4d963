"""Errors of `parallelize` name the line of the user's code, and what they suggest is there and works."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import axonn
from axonn import tensor
from axonn.autoparallel.sharded_layers import refusal
from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from tests.autoparallel.test_parallelize_use import function
from tests.helpers.parallel_cases import normal
from tests.helpers.parallelizing import check, layer


def raised(module: nn.Module, *example: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        axonn.parallelize(module, ProcessGrid(), example_inputs=example or (torch.ones(2, 4),))
    return str(caught.value)


def branching(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else -x  # here


def converting(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    scale = float(x.sum())  # here
    return x * scale


def looping(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for part in x:  # here
        x = x + part
    return x


def assigning(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 0] = 0  # here
    return y


def random_noise(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    return y + torch.randn_like(x)  # here


def attention_dropout(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)  # here


def changing_a_view(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.view(-1).add_(1)  # here
    return y


def changing_a_buffer(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    self.seen.add_(1)  # here
    return x


def wrong_shape(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    return y.view(7, -1)  # here


def running_statistics(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, self.seen, self.seen, training=self.training)  # here


def unbatched_dropout(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x.t(), 0.5, self.training)  # here


def inner_call(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = self.inner(x)
    return y


FORWARDS = [
    *(branching, converting, looping, assigning, random_noise, attention_dropout, changing_a_view, changing_a_buffer),
    *(wrong_shape, running_statistics, unbatched_dropout),
]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_errors_name_the_line(forward: Callable[..., Any], inside: bool) -> None:
    module = function(forward)
    module.register_buffer("seen", torch.zeros(4))
    lines, first = inspect.getsourcelines(forward)
    (number,) = [i for i, line in enumerate(lines) if "# here" in line]
    message = raised(function(inner_call, inner=module) if inside else module)
    assert f"tests/autoparallel/test_parallelize_errors.py:{first + number}: `{lines[number].strip()}`" in message


SMALL: dict[str, tuple[Any, ...]] = {
    "MultiheadAttention": (12, 2),
    "TransformerEncoderLayer": (12, 2, 24, 0.0),
    "TransformerDecoderLayer": (12, 2, 24, 0.0),
    "Transformer": (12, 2, 1, 1, 24, 0.0),
    "LSTM": (12, 12),
    "GRU": (12, 12),
    "RNN": (12, 12),
    "GRUCell": (12, 12),
    "LSTMCell": (12, 12),
    "Bilinear": (12, 12, 12),
    "Conv1d": (12, 12, 1),
    "Conv2d": (12, 12, 1),
    "Conv3d": (12, 12, 1),
    "ConvTranspose1d": (12, 12, 1),
    "ConvTranspose2d": (12, 12, 1),
    "BatchNorm1d": (12,),
    "BatchNorm2d": (12,),
    "InstanceNorm2d": (12, 1e-5, 0.1, True),
    "Linear": (12, 12),
    "Embedding": (12, 12),
    "EmbeddingBag": (12, 12),
    "LayerNorm": (12,),
    "RMSNorm": (12,),
    "GroupNorm": (2, 12),
    "PReLU": (),
    "Dropout": (),
}


def suggestions(text: str) -> set[str]:
    """Names of Python in a message: what could be imported."""
    return set(re.findall(r"\b((?:axonn(?:\.\w+)*|torch(?:\.\w+)*|nn|F)\.\w+)", text))


@pytest.mark.parametrize("name", SMALL)
def test_what_a_single_layer_is_told_exists_and_works(name: str) -> None:
    single = getattr(nn, name)(*SMALL[name])
    message = raised(single)
    for suggestion in suggestions(message):
        assert eval(suggestion, {"axonn": axonn, "torch": torch, "nn": nn, "F": F}), suggestion
    if "nn.Sequential" in message:
        shape = (2, 3) if name == "Embedding" else (2, 12, 2, 2) if name in ("Conv2d", "GroupNorm") else (2, 12)
        example = torch.zeros(shape, dtype=torch.int64 if name == "Embedding" else torch.float64)
        norm = name.endswith("Norm")
        before = [nn.Conv2d(12, 12, 1) if len(shape) == 4 else nn.Linear(12, 12)] if norm else []
        assert ("before and after it" in message) is norm
        around = nn.Sequential(*before, single, *copy.deepcopy(before))
        for outcome in check(around, [example], row=1, col=2, input_gradients=False):
            assert layer(outcome, str(len(before))).kind == name
            assert any(type(m) is getattr(tensor, name) for m in outcome.parallel.modules())
    else:
        assert refusal(single) in message


def test_every_name_in_the_sources_of_the_errors_exists() -> None:
    """Whatever the modules of parallelize say in a string can be found under that name."""
    from axonn.autoparallel import parallelize, part_gradients, rewrite, sharded_layers
    from axonn.autoparallel.tracing import module_trace, normalisation

    for module in (part_gradients, parallelize, sharded_layers, normalisation, rewrite, module_trace):
        for string in re.findall(r'f?"([^"\n]*)"', inspect.getsource(module)):
            for name in suggestions(string):
                assert eval(name, {"axonn": axonn, "torch": torch, "nn": nn, "F": F}), f"{module.__name__}: {name}"


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm writes it: a batch norm with a forward of its own, that counts batches and activates."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.running_mean is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum, self.eps
        )
        z: torch.Tensor = self.act(y)
        return z


class Named(nn.Linear):
    """A layer under another name."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features)
        self.features = features

    def extra_repr(self) -> str:
        return "named"


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(input, weight * 2, bias)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: output - output.mean(0, keepdim=True))
    return layer


def test_derived_classes_are_what_they_inherit() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 12, 1), BatchNormAct2d(12), OwnConvolution(12, 12, 1), nn.Conv2d(12, 12, 1))
    for row, col in ((1, 2), (2, 2)):
        for outcome in check(conv, [normal(2, 3, 4, 4)], row=row, col=col):
            assert {line.name for line in outcome.report.whole} >= {"1"}
            assert int(outcome.parallel.module.get_buffer("1.num_batches_tracked")) == 1
            assert "2" not in {line.name for line in outcome.report.layers}
            outcome.parallel.eval()
    linear = nn.Sequential(
        Named(12),
        Doubling(12, 12),
        hooked(nn.Linear(12, 12)),
        nn.utils.parametrizations.weight_norm(nn.Linear(12, 12)),
        Named(12),
    )
    for outcome in check(linear, [normal(3, 12)], row=1, col=2, sub_shards=2):
        assert [line.name for line in outcome.report.layers] == ["0", "4"]
        assert outcome.report.sub_shards == 1, "the hook mixes rows"


def test_a_derived_batch_norm_follows_the_mode() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4))
    parallel = axonn.parallelize(module, ProcessGrid(), example_inputs=(torch.zeros(2, 3, 4, 4),))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(parallel.eval()(x), module.eval()(x))


def test_a_layer_of_torch_whose_dropout_is_none_is_taken() -> None:
    module = nn.Sequential(nn.Linear(12, 12), nn.TransformerEncoderLayer(12, 2, 24, 0.0, batch_first=True))
    for outcome in check(module, [normal(2, 3, 12)], row=1, col=2):
        assert [line.name for line in outcome.report.whole] == ["1"]
    with pytest.raises(ConfigError, match="dropout of its own"):
        check(
            nn.Sequential(nn.TransformerEncoderLayer(12, 2, 24, 0.1, batch_first=True)),
            [normal(2, 3, 12)],
            row=1,
            col=2,
        )
