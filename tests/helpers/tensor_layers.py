"""A layer on every rank of a grid, compared with the same layer of torch.nn on one: outputs and every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from hypothesis import strategies as st
from mpi4py import MPI
from torch import nn

from axonn.distributed.collectives import Collectives
from axonn.distributed.runtime import connect
from axonn.distributed.transport import InProcessCollectives, InProcessWorld
from axonn.grid import ProcessGrid
from axonn.placement import Cut, Placement
from axonn.tensor import NORMAL, TRANSPOSED, Layout, TensorAxis, TensorContext, placements
from axonn.tensor.gradient_accumulation import WeightGradients
from axonn.tensor.in_place import accumulate_in_place
from tests.helpers.rank_pool import RankPool
from tests.helpers.rounding import tightened

TOLERANCE = tightened(1e-12)
BACKWARDS = 2
"""Their gradients accumulate."""

LAYOUTS = [NORMAL, TRANSPOSED] + [
    Layout(a, b) for a, b in ((None, "row"), (None, "col"), ("row", None), ("col", None), (None, None))
]
grids = st.builds(ProcessGrid, row=st.integers(1, 4), col=st.integers(1, 4))
Accumulation = Literal["autograd", "in place", "deferred"]
accumulations = st.sampled_from(["autograd", "in place", "deferred"])


class Input(NamedTuple):
    """A whole tensor that goes in, and how it is cut. With `below`, of integers."""

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    below: int | None = None
    offset: float = 0.0


class Laid(NamedTuple):
    """A rank's part of a tensor, and how the whole one is cut."""

    tensor: torch.Tensor
    cuts: tuple[Cut, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer. `serial` makes that of torch.nn, `parallel` ours, given `context`.

    `serial_names`: of the parameters that are called otherwise there.
    """

    grid: ProcessGrid
    serial: Callable[[], nn.Module]
    parallel: Callable[..., nn.Module]
    inputs: tuple[Input, ...]
    output: tuple[Cut, ...] = ()
    accumulation: Accumulation = "autograd"
    serial_names: dict[str, str] = field(default_factory=dict)


def extent_of(grid: ProcessGrid, axis: TensorAxis | None) -> int:
    return 1 if axis is None else grid.extent(axis)


def cut_along(dim: int, axis: TensorAxis | None, segments: Sequence[int]) -> tuple[Cut, ...]:
    return () if axis is None else (Cut(dim, axis, tuple(segments)),)


def part_of(whole: torch.Tensor, cuts: tuple[Cut, ...], grid: ProcessGrid, rank: int) -> torch.Tensor:
    """What a rank holds of a tensor."""
    placement = Placement(shape=tuple(whole.shape), cuts=cuts)
    part = whole.new_empty(placement.local_shape(grid))
    for local, box in placement.pieces(grid, grid.coordinates(rank)):
        part[local] = whole[box]
    return part


def with_collectives(grid: ProcessGrid, body: Callable[[Collectives], Any]) -> list[Any]:
    """Results of `body(collectives)` by rank, all ranks in this process."""
    world = InProcessWorld(grid.size)
    return world.run(lambda rank: body(InProcessCollectives(world, grid, rank)))


def on_every_rank(grid: ProcessGrid, body: Callable[[TensorContext, int], Any], *, seed: int = 0) -> list[Any]:
    """Results of `body(context, rank)` by rank, all ranks in this process."""
    return with_collectives(grid, lambda c: body(TensorContext(grid, c.rank, c, seed=seed), c.rank))


def compare(case: Case, pool: RankPool | None = None, *, tolerance: float = TOLERANCE) -> None:
    """Assert that every rank computes its part of what the serial layer does, and replicas the same bits.

    In process, or over Gloo by the ranks of a `pool`.
    """
    expected, given = _serially(case)
    if pool is not None:
        found = pool.run(_over_gloo, case, given, ranks=case.grid.size)
    else:
        found = on_every_rank(case.grid, lambda context, rank: in_parallel(case, context, rank, given))
    for rank, outcome in enumerate(found):
        assert outcome.keys() == expected.keys()
        for name, (tensor, cuts) in outcome.items():
            assert_near(tensor, part_of(expected[name], cuts, case.grid, rank), f"{name} of rank {rank}", tolerance)
    assert_replicas(case.grid, found)


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape, what
    error = (found - expected).abs().max() if found.numel() else torch.zeros(())
    assert error <= tolerance * max(1.0, float(expected.abs().max())), f"{what}: off by {error:.1e}"


def assert_replicas(grid: ProcessGrid, found: Sequence[dict[str, Laid]]) -> None:
    """Ranks that hold the same part of a tensor hold the same bits."""
    first: dict[Any, torch.Tensor] = {}
    for rank, outcome in enumerate(found):
        here = grid.coordinates(rank)
        for name, (tensor, cuts) in outcome.items():
            place = name, *(getattr(here, cut.axis) for cut in cuts)
            assert torch.equal(first.setdefault(place, tensor), tensor), f"{name} of rank {rank}"


def in_parallel(case: Case, context: TensorContext, rank: int, given: _Given) -> dict[str, Laid]:
    """What one rank computes, by name."""
    layer = case.parallel(context=context).to(torch.float64)
    cuts = {name: placement.cuts for name, placement in placements(layer).items()}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(part_of(given.parameters[case.serial_names.get(name, name)], cuts[name], case.grid, rank))
    queue = None if case.accumulation == "autograd" else WeightGradients()
    if queue is not None:
        accumulate_in_place(layer, queue)
    found: dict[str, Laid] = {}
    for step, (inputs, gradient) in enumerate(given.steps):
        mine = [part_of(x, i.cuts, case.grid, rank) for x, i in zip(inputs, case.inputs, strict=True)]
        for x in mine:
            x.requires_grad_(x.dtype.is_floating_point)
        y = layer(*mine)
        found[f"output {step}"] = Laid(y.detach(), case.output)
        if queue is not None:
            queue.deferring = case.accumulation == "deferred"
        y.backward(part_of(gradient, case.output, case.grid, rank))
        if queue is not None:
            queue.take()()
        for number, (x, i) in enumerate(zip(mine, case.inputs, strict=True)):
            if x.grad is not None:
                found[f"gradient of input {number} in {step}"] = Laid(x.grad, i.cuts)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[f"gradient of {case.serial_names.get(name, name)}"] = Laid(parameter.grad, cuts[name])
    return found


class _Given(NamedTuple):
    """Whole parameters by their serial names, and the whole inputs and gradient of the output of each backward."""

    parameters: dict[str, torch.Tensor]
    steps: list[tuple[list[torch.Tensor], torch.Tensor]]


def _serially(case: Case) -> tuple[dict[str, torch.Tensor], _Given]:
    """Outputs and gradients of the serial layer, and what it was given."""
    generator = torch.Generator().manual_seed(1)

    def random(i: Input) -> torch.Tensor:
        if i.below is not None:
            return torch.randint(0, i.below, i.shape, generator=generator)
        return torch.randn(i.shape, generator=generator, dtype=torch.float64) + i.offset

    layer = case.serial().to(torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            # Of the scale that layers have: with larger weights a softmax of attention saturates, and its gradient is
            # what rounding leaves of differences.
            scale = math.sqrt(parameter.shape[1:].numel())
            parameter.copy_(random(Input(tuple(parameter.shape))) / scale)
    given = _Given({name: p.detach().clone() for name, p in layer.named_parameters()}, [])
    found = {}
    for step in range(BACKWARDS):
        inputs = [random(i) for i in case.inputs]
        alive = [x.clone().requires_grad_(x.dtype.is_floating_point) for x in inputs]
        y = layer(*alive)
        gradient = random(Input(tuple(y.shape)))
        y.backward(gradient)
        given.steps.append((inputs, gradient))
        found[f"output {step}"] = y.detach()
        found |= {f"gradient of input {n} in {step}": x.grad for n, x in enumerate(alive) if x.grad is not None}
    found |= {f"gradient of {n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return found, given


def _over_gloo(comm: MPI.Intracomm, case: Case, given: _Given) -> dict[str, Laid]:
    """A job of the rank pool."""
    with connect(case.grid, comm=comm) as runtime:
        context = TensorContext(case.grid, runtime.rank, runtime.collectives)
        return in_parallel(case, context, runtime.rank, given)
