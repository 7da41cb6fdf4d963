"""Compares a module that `axonn.parallelize` has cut, on every rank of a grid, with the module itself."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import axonn
from axonn.autoparallel.parallel_report import Report
from axonn.autoparallel.rewrite import part_of
from axonn.distributed.collectives import Call
from axonn.distributed.transport import InProcessCollectives, InProcessWorld
from axonn.grid import ProcessGrid
from tests.rounding import tightened

TOLERANCE = tightened(1e-12)


@dataclass
class Outcome:
    """What one rank has seen. `calls`: of forward and backward alone."""

    parallel: axonn.ParallelModule
    report: Report
    calls: Counter[Call]


def check(
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    *,
    row: int,
    col: int,
    sub_shards: int = 1,
    input_gradients: bool = True,
) -> list[Outcome]:
    """Outputs, input gradients and every parameter's gradient on every rank equal those of `module`, in float64."""
    module = module.double()
    grid = ProcessGrid(row=row, col=col)
    before = copy.deepcopy(module.state_dict())
    serial = copy.deepcopy(module)
    outputs, gradients = _run(serial, inputs, input_gradients)
    named = dict(serial.named_parameters(remove_duplicate=False))
    world = InProcessWorld(grid.size)

    def body(rank: int) -> tuple[Outcome, list[torch.Tensor], list[torch.Tensor | None]]:
        collectives = InProcessCollectives(world, grid, rank)
        parallel = axonn.parallelize(
            module, grid, example_inputs=tuple(inputs), collectives=collectives, overdecomposition=sub_shards
        )
        issued = Counter(collectives.calls)
        mine = _run(parallel, inputs, input_gradients)
        return Outcome(parallel, parallel.report, collectives.calls - issued), *mine

    found = []
    for outcome, mine, of_inputs in world.run(body):
        found.append(outcome)
        for a, b in zip([*mine, *of_inputs], [*outputs, *gradients], strict=True):
            _same(a, b, "an output or a gradient of an input")
        _compare_parameters(outcome.parallel, named)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the original has changed"
    return found


def _run(
    module: nn.Module, inputs: Sequence[torch.Tensor], input_gradients: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Outputs of a forward, and gradients of the inputs after a backward with fixed gradients of the outputs."""
    mine = [t.detach().clone().requires_grad_(input_gradients and t.is_floating_point()) for t in inputs]
    outputs = pytree.tree_leaves(module(*mine))
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    sum((t * w).sum() for t, w in zip(outputs, weights, strict=True)).backward()  # type: ignore[union-attr]
    return [t.detach() for t in outputs], [t.grad for t in mine]


def _compare_parameters(parallel: axonn.ParallelModule, named: dict[str, nn.Parameter]) -> None:
    placed = parallel.placements()
    mine = dict(parallel.named_parameters(remove_duplicate=False))
    assert {name.removeprefix("module.") for name in mine} == set(named)
    for name, parameter in mine.items():
        whole, placement = named[name.removeprefix("module.")], placed[name]
        _same(parameter, part_of(whole.detach(), placement, parallel.context), name)
        expected = None if whole.grad is None else part_of(whole.grad, placement, parallel.context)
        _same(parameter.grad, expected, f"the gradient of {name}")


def _same(a: torch.Tensor | None, b: torch.Tensor | None, what: str) -> None:
    if a is None or b is None:
        assert a is b, f"{what}: {a} instead of {b}"
        return
    assert a.shape == b.shape, what
    difference = (a - b).abs().max().item() if a.numel() else 0.0
    assert difference <= TOLERANCE * max(1.0, b.abs().max().item() if b.numel() else 1.0), f"{what}: {difference}"


def kinds(outcome: Outcome) -> dict[str, int]:
    """How many redistributions of each kind there are."""
    found: dict[str, int] = {}
    for line in outcome.report.redistributions:
        found[line.kind] = found.get(line.kind, 0) + 1
    return found


def layer(outcome: Outcome, name: str) -> Any:
    """The report's line of a layer."""
    return next(line for line in outcome.report.layers if line.name == name)
