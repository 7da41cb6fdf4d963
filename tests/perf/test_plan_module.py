"""Plans for ordinary modules: the outline of a module sends what `parallelize` really issues."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import axonn
from axonn import tensor
from axonn.autoparallel.layer_kinds import KINDS
from axonn.autoparallel.module_outline import outline_of_module
from axonn.distributed.collectives import Call
from axonn.distributed.transport import InProcessCollectives, InProcessWorld
from axonn.grid import ProcessGrid
from tests.helpers.command_line import CommandLine

ROWS = 4


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 8))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 8),
    )


def among_linears(layer: nn.Module) -> nn.Module:
    """A layer of 24 features whose input and output are cut."""
    return nn.Sequential(nn.Linear(12, 24), layer, nn.Linear(24, 12))


def among_convolutions(layer: nn.Module) -> nn.Module:
    """A layer of 8 channels whose input and output are cut."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.Conv2d(8, 8, 1))


WORDS, ROW, SEQUENCE, IMAGE = (ROWS, 5), (ROWS, 12), (ROWS, 6, 12), (ROWS, 3, 8, 8)
Options = dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]
LAYERS: dict[type[nn.Module], Options] = {
    nn.Linear: {
        "two in a row": (lambda: among_linears(nn.Linear(24, 24)), ROW),
        "of sequences": (lambda: among_linears(nn.Linear(24, 24)), SEQUENCE),
        "no bias": (lambda: among_linears(nn.Linear(24, 24, bias=False)), ROW),
        "an odd size": (lambda: nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 12)), ROW),
        "mlp": (mlp, ROW),
    },
    nn.Conv2d: {
        "no bias": (lambda: among_convolutions(nn.Conv2d(8, 8, 3, padding=1, bias=False)), IMAGE),
        "a stride": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, stride=2)), IMAGE),
        "a dilation": (lambda: among_convolutions(nn.Conv2d(8, 8, 3, dilation=2)), IMAGE),
        "padded by itself": (lambda: among_convolutions(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), IMAGE),
        "padded at one side": (lambda: among_convolutions(nn.Conv2d(8, 8, 2, padding="same")), IMAGE),
        "cnn": (cnn, IMAGE),
    },
    nn.Embedding: {
        "plain": (lambda: nn.Sequential(nn.Embedding(24, 24), nn.Linear(24, 12)), WORDS),
        "padding": (lambda: nn.Sequential(nn.Embedding(24, 24, padding_idx=1), nn.Linear(24, 12)), WORDS),
        "odd vocabulary": (lambda: nn.Sequential(nn.Embedding(25, 24), nn.Linear(24, 12)), WORDS),
    },
    nn.LayerNorm: {
        "plain": (lambda: among_linears(nn.LayerNorm(24)), ROW),
        "of sequences": (lambda: among_linears(nn.LayerNorm(24)), SEQUENCE),
        "no bias": (lambda: among_linears(nn.LayerNorm(24, bias=False)), ROW),
        "not affine": (lambda: among_linears(nn.LayerNorm(24, elementwise_affine=False)), ROW),
        "over two dims": (lambda: among_linears(nn.LayerNorm((6, 24))), SEQUENCE),
    },
    nn.RMSNorm: {
        "plain": (lambda: among_linears(nn.RMSNorm(24)), ROW),
        "of sequences": (lambda: among_linears(nn.RMSNorm(24)), SEQUENCE),
        "not affine": (lambda: among_linears(nn.RMSNorm(24, elementwise_affine=False)), ROW),
        "over two dims": (lambda: among_linears(nn.RMSNorm((6, 24))), SEQUENCE),
    },
    nn.GroupNorm: {
        "groups on a rank": (lambda: among_convolutions(nn.GroupNorm(4, 8)), IMAGE),
        "groups across ranks": (lambda: among_convolutions(nn.GroupNorm(1, 8)), IMAGE),
        "not affine": (lambda: among_convolutions(nn.GroupNorm(1, 8, affine=False)), IMAGE),
    },
}
EVERY = [pytest.param(kind, option, id=f"{kind.__name__}, {option}") for kind in LAYERS for option in LAYERS[kind]]


def test_every_kind_of_layer_has_its_case() -> None:
    assert set(LAYERS) == set(KINDS)
    layers = {getattr(tensor, name) for name in tensor.__all__ if isinstance(getattr(tensor, name), type)}
    built = {layer.__name__ for layer in layers if issubclass(layer, tensor.TensorLayer)} - {"TensorLayer"}
    assert built == {kind.__name__ for kind in LAYERS}


@pytest.mark.parametrize(("row", "col"), [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize(("kind", "option"), EVERY)
def test_the_outline_sends_and_keeps_what_parallelize_does(
    kind: type[nn.Module], option: str, row: int, col: int
) -> None:
    """Collectives to the byte, some in the type of the module and some in a wider one, and a rank's parameters."""
    dtype = torch.bfloat16
    factory, shape = LAYERS[kind][option]
    inputs = (torch.zeros(shape, dtype=torch.int64 if shape == WORDS else dtype),)
    grid = ProcessGrid(row=row, col=col)
    outline = outline_of_module(factory().to(dtype), grid, inputs)
    parts = [part for link in outline.links for part in link.parts.values()]
    expected = Counter(
        (e.kind, (e.axis,), e.elements * (max(4, dtype.itemsize) if e.wide else dtype.itemsize))
        for part in parts
        for e in [*part.forward(grid, ROWS), *part.backward(grid, ROWS)]
    )
    parameters = sum(outline.links[0].parameters(grid).values())
    world = InProcessWorld(grid.size)

    def body(rank: int) -> tuple[axonn.ParallelModule, Counter[Call]]:
        collectives = InProcessCollectives(world, grid, rank)
        parallel = axonn.parallelize(factory().to(dtype), grid, example_inputs=inputs, collectives=collectives)
        issued = Counter(collectives.calls)
        parallel(*inputs).sum().backward()
        return parallel, collectives.calls - issued

    for parallel, calls in world.run(body):
        assert any(type(part) is getattr(tensor, kind.__name__) for part in parallel.modules())
        issued: Counter[tuple[str, tuple[str, ...], int]] = Counter()
        for call, count in calls.items():
            issued[call.kind, tuple(call.axes), call.bytes] += count
        assert issued == expected
        assert parameters == sum(p.numel() for p in parallel.parameters())


def test_parameters_of_the_outline_are_those_of_a_rank() -> None:
    outline = outline_of_module(mlp(), ProcessGrid(), (torch.randn(ROWS, 12),))
    assert sum(outline.links[0].parameters(ProcessGrid()).values()) == sum(p.numel() for p in mlp().parameters())


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


COMMON = ("--machine", "summit", "--gpus", "4", "--batch", "16", "--precision", "float32")


def test_a_module_is_planned_by_its_factory(command: CommandLine) -> None:
    code, text, error = command(
        "plan", "--module", "tests.perf.test_plan_module:cnn", "--input", "float32[4,3,8,8]", *COMMON
    )
    assert code == 0, error
    assert "axonn.parallelize(module, ProcessGrid(data=4, row=1, col=1))" in text
    assert "a module without a chain of layers has no stages" in text


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_no_two_rows_of_a_plan_are_the_same(command: CommandLine, name: str) -> None:
    shape = "float32[4,3,8,8]" if name == "cnn" else "float32[4,12]"
    code, text, error = command("plan", "--module", f"tests.perf.test_plan_module:{name}", "--input", shape, *COMMON)
    assert code == 0, error
    rows = re.findall(r"^ *\d+ +(\d+ x .*)$", text, re.MULTILINE)
    assert len(rows) > 5
    choices = [re.split(r"  +", r)[:2] for r in rows]
    assert len({tuple(choice) for choice in choices}) == len(rows), "rows that parallelize cannot tell apart"
    assert not re.search("offloaded|every", text)


@pytest.mark.parametrize(
    "pins",
    [("--optimizer", "offloaded"), ("--checkpointing", "auto"), ("--checkpointing", "2"), ("--schedule", "1f1b")],
)
def test_what_only_the_engine_does_is_refused(command: CommandLine, pins: tuple[str, str]) -> None:
    module = ("--module", "tests.perf.test_plan_module:mlp", "--input", "float32[4,12]")
    command.refuses("leave it out for a --module", "plan", *module, *pins, *COMMON)


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        ("tests.perf.test_plan_module:rnn", "float32[4,12]", "give package.module:factory"),
        ("tests.perf.test_plan_module:mlp", "float33[4,12]", "write a type of torch and a shape"),
        ("tests.perf.test_plan_module:COMMON.count", "float32[4,12]", "give package.module:factory"),
    ],
)
def test_bad_modules_are_refused(command: CommandLine, module: str, shape: str, message: str) -> None:
    command.refuses(message, "plan", "--module", module, "--input", shape, *COMMON)
