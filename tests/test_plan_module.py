"""Plans for ordinary modules: the outline of a module sends what `parallelize` really issues."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from axonn.grid import ProcessGrid
from axonn.tensor.graph.outline import outline_of_module
from tests import parallelizing
from tests.command_line import CommandLine

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


EXAMPLES = {"mlp": (mlp, (ROWS, 12)), "cnn": (cnn, (ROWS, 3, 8, 8))}


@pytest.mark.parametrize(("row", "col"), [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_outline_sends_what_parallelize_issues(name: str, row: int, col: int) -> None:
    factory, shape = EXAMPLES[name]
    inputs = (torch.randn(shape, dtype=torch.float64),)
    outcomes = parallelizing.check(factory(), inputs, row=row, col=col, input_gradients=False)
    grid = ProcessGrid(row=row, col=col)
    outline = outline_of_module(factory().double(), grid, inputs)
    parts = [part for link in outline.links for part in link.parts.values()]
    expected = Counter(
        (e.kind, (e.axis,), e.elements)
        for part in parts
        for e in [*part.forward(grid, ROWS), *part.backward(grid, ROWS)]
    )
    for outcome in outcomes:
        issued: Counter[tuple[str, tuple[str, ...], int]] = Counter()
        for call, count in outcome.calls.items():
            issued[call.kind, tuple(call.axes), call.elements] += count
        assert issued == expected


def test_parameters_of_the_outline_are_those_of_a_rank() -> None:
    outline = outline_of_module(mlp(), ProcessGrid(), (torch.randn(ROWS, 12),))
    assert sum(outline.links[0].parameters(ProcessGrid()).values()) == sum(p.numel() for p in mlp().parameters())


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


COMMON = ("--machine", "summit", "--gpus", "4", "--batch", "16", "--precision", "float32")


def test_a_module_is_planned_by_its_factory(command: CommandLine) -> None:
    code, text, error = command(
        "plan", "--module", "tests.test_plan_module:cnn", "--input", "float32[4,3,8,8]", *COMMON
    )
    assert code == 0, error
    assert "axonn.parallelize(module, ProcessGrid(data=4, row=1, col=1))" in text
    assert "a module without a chain of layers has no stages" in text


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        ("tests.test_plan_module:rnn", "float32[4,12]", "give package.module:factory"),
        ("tests.test_plan_module:mlp", "float33[4,12]", "write a type of torch and a shape"),
        ("tests.test_plan_module:COMMON.count", "float32[4,12]", "give package.module:factory"),
    ],
)
def test_bad_modules_are_refused(command: CommandLine, module: str, shape: str, message: str) -> None:
    command.refuses(message, "plan", "--module", module, "--input", shape, *COMMON)
