"""The state of a module that is cut goes out and in again, to the bit, on every grid."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import axonn
from axonn.distributed.transport import InProcessCollectives, InProcessWorld
from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from tests.helpers.parallel_cases import CASES, make

GRIDS = [
    ProcessGrid(col=2),
    ProcessGrid(row=2),
    ProcessGrid(row=2, col=2),
    ProcessGrid(data=2),
]


def on(name: str, grid: ProcessGrid, body: Callable[[axonn.ParallelModule], Any]) -> list[Any]:
    """Results of `body` with the case `name` cut, on every rank."""
    module, inputs = make(name), CASES[name].inputs()
    world = InProcessWorld(grid.size)

    def run(rank: int) -> Any:
        collectives = InProcessCollectives(world, grid, rank)
        return body(axonn.parallelize(module, grid, example_inputs=tuple(inputs), collectives=collectives))

    return world.run(run)


def another(module: nn.Module) -> dict[str, torch.Tensor]:
    """A state of `module` with other values, tied ones alike."""
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.ones_like(value))
    return module.state_dict()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_whole_state_goes_out_and_in(name: str, grid: ProcessGrid) -> None:
    expected, other = make(name).state_dict(), another(make(name))

    def body(parallel: axonn.ParallelModule) -> None:
        before = parallel.full_state_dict()
        assert_same(before, expected)
        parallel.load_full_state_dict(other)
        assert_same(parallel.full_state_dict(), other)
        parallel.load_full_state_dict(before)
        assert_same(parallel.full_state_dict(), expected)

    on(name, grid, body)


@pytest.mark.parametrize("name", CASES)
def test_a_rank_s_own_state_has_the_names_of_the_module_and_goes_in_again(name: str) -> None:
    grid = ProcessGrid(row=2, col=2)
    module = make(name)
    names = [f"module.{n}" for n in module.state_dict()]
    parameters = {f"module.{n}" for n, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {f"module.{n}" for n, _ in module.named_buffers(remove_duplicate=False)}
    ties = len(list(module.parameters()))

    def body(parallel: axonn.ParallelModule) -> None:
        expected = parallel.full_state_dict()
        file = io.BytesIO()
        torch.save(parallel.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        assert sorted(saved) == sorted(names)
        placed = parallel.placements()
        assert set(placed) == {*parameters, *buffers}
        for found, value in parallel.named_parameters(remove_duplicate=False):
            assert placed[found].local_shape(grid) == value.shape, found
        assert len(list(parallel.parameters())) == ties, "a tie is lost"
        parallel.load_full_state_dict(another(make(name)))
        parallel.load_state_dict(saved)
        assert_same(parallel.full_state_dict(), expected)

    on(name, grid, body)


@pytest.mark.parametrize("name", CASES)
def test_what_is_missing_unknown_or_of_another_shape_is_named_and_nothing_changes(name: str) -> None:
    def body(parallel: axonn.ParallelModule) -> None:
        before = parallel.full_state_dict()
        first, *_ = before
        wrong = {n: torch.zeros(1, 2, 3, 4, 5) for n in before} | {"stranger": torch.zeros(1)}
        with pytest.raises(ConfigError, match=rf"stranger is not known; {first} has shape \[1, 2, 3, 4, 5\]"):
            parallel.load_full_state_dict(wrong)
        with pytest.raises(ConfigError, match=f"{first} is missing"):
            parallel.load_full_state_dict({})
        assert_same(parallel.full_state_dict(), before)

    on(name, ProcessGrid(row=2, col=2), body)
