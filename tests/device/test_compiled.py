"""Functions that are compiled on GPUs, here on a CPU: the same masks to the bit, the same losses; and what happens when
a compiler fails."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from axonn.device.compilation import Compiler
from axonn.tensor import TensorContext, cross_entropy
from axonn.tensor.counter_random import keep_elements, keep_mask, keep_threshold, packed_keys, stream_key
from axonn.tensor.layers.dropout import Dropout
from axonn.tensor.layers.group_norm import _channels_last
from tests.helpers.comparing import check_every_rank
from tests.helpers.training import Case, train_in_process

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("shape", "box"),
    [((7, 9), ((0, 7), (0, 9))), ((6, 10, 5), ((2, 4), (0, 10), (1, 4))), ((4, 8), ((0, 4), (4, 8)))],
)
def test_masks_in_one_kernel_have_the_same_bits(
    shape: tuple[int, ...], box: tuple[tuple[int, int], ...], p: float
) -> None:
    keys = [stream_key(3, "mask", sample) for sample in range(4)]
    expected = keep_mask(keys, p, shape=shape, box=[slice(*sides) for sides in box])
    found = keep_elements(packed_keys(keys), keep_threshold(p), shape, box)
    assert torch.equal(found, expected)
    assert expected.any()
    assert not expected.all()


@needs_compiler
@pytest.mark.full
def test_compiled_dropout_drops_the_same() -> None:
    x = torch.ones(3, 40, 6)
    results = []
    for mode in ("never", "always"):
        context = TensorContext.serial(seed=5)
        context.compiler = Compiler(mode)  # type: ignore[arg-type]
        layer = Dropout(0.3, name="a", context=context, cuts=((2, "row"),))
        with warnings.catch_warnings(), context.positions.at(2, [4, 5, 6]):
            warnings.simplefilter("error", UserWarning)
            results.append(layer(x))
    assert torch.equal(results[0], results[1])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_loss_is_the_same_within_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values, targets = torch.randn(12, 50), torch.randint(50, (12,))
    found = []
    for mode in ("never", "always"):
        context = TensorContext.serial()
        context.compiler = Compiler(mode)  # type: ignore[arg-type]
        logits = values.to(dtype).requires_grad_()
        loss = cross_entropy(logits, targets, context=context)
        loss.backward()
        assert loss.dtype == torch.float32
        assert logits.grad is not None
        found.append((loss.item(), logits.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    bound = {torch.float32: 1e-7, torch.bfloat16: 2**-9}[dtype]
    assert (found[0][1] - found[1][1]).abs().max() <= bound * found[0][1].abs().max() + 1e-8


@needs_compiler
def test_training_with_compiled_functions_equals_serial_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.training.COMPILE", "always")
    case = Case(dropout=0.1, microbatches=2, steps=2, recompute=1)
    check_every_rank(case, train_in_process(case))


def _broken(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(function: Any) -> Any:
        def fail(*arguments: Any) -> None:
            raise RuntimeError("no compiler\nand a long story")

        return fail

    monkeypatch.setattr(torch, "compile", compile_)
    compiler = Compiler("always")
    x = torch.zeros(2)
    with pytest.warns(UserWarning, match="_broken runs uncompiled, since compiling it failed: no compiler$"):
        assert compiler.run(_broken, x, like=x).tolist() == [1.0, 1.0]
    assert not compiler.wanted(_broken, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler.run(_broken, x, like=x).tolist() == [1.0, 1.0]


def test_running_out_of_memory_is_no_failure_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(function: Any) -> Any:
        def fail(*arguments: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return fail

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(torch.OutOfMemoryError):
        Compiler("always").run(_broken, torch.zeros(2), like=torch.zeros(2))


def test_only_gpus_are_compiled_for_unless_asked() -> None:
    x = torch.zeros(2)
    assert [Compiler(mode).wanted(_broken, x) for mode in ("auto", "always", "never")] == [False, True, False]  # type: ignore[arg-type]


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_of_channels_last_is_torch_s(affine: bool) -> None:
    torch.manual_seed(1)
    values = torch.randn(2, 12, 4, 5, dtype=torch.float64) * 3 + 1
    weight, bias = (torch.randn(12, dtype=torch.float64) if affine else None for _ in range(2))
    found = []
    for norm in (F.group_norm, _channels_last):
        x = values.clone(memory_format=torch.channels_last).requires_grad_()
        y = norm(x, 4, weight, bias, 1e-5)
        (y * torch.arange(5)).sum().backward()
        found.append((y, x.grad))
        assert y.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        Case(model_kind="unet", microbatches=2, dropout=0.1, steps=3),
        Case(model_kind="unet", inter=2, microbatches=3, steps=3),
        Case(model_kind="unet", row=2, col=2, sub_shards=2, steps=3),
    ],
    ids=["alone", "two stages", "row x col"],
)
def test_a_unet_with_channels_last_computes_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def always(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return x.contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr("axonn.models.unet.unet_model.channels_last", always)
    check_every_rank(case, train_in_process(case))
    # Most are so already: what is between keeps the order.
    assert case.grid.tensor > 1 or sum(seen) > len(seen) / 2
