"""Spans prove what runs under what: on a clock that only computing and waiting move, and in real runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from mpi4py import MPI
from torch import nn

from axonn import tensor
from axonn.distributed.collectives import CollectiveGroup, CollectiveHandle, Collectives, Operation
from axonn.distributed.runtime import connect
from axonn.distributed.tensor_spec import TensorSpec
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.models.base import Layer
from axonn.models.initialization import Initial, Normal
from axonn.spans import Overlap, Span, SpanKind, SpanRecorder, breakdown, overlap
from axonn.tensor import TRANSPOSED, TensorContext
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import Case, batch_of, make_engine

ROWS, BLOCKS, MICROBATCHES = 4, 3, 2
TAKES = 4.0
"""Seconds of a collective. A row takes 1 second in each matrix product."""
COMPUTE = (SpanKind.FORWARD, SpanKind.BACKWARD)


class Clock:
    """Stands still, unless somebody computes or waits."""

    time = 0.0

    def now(self) -> float:
        return self.time

    def pass_by(self, seconds: float) -> None:
        self.time += seconds


class LateWork(CollectiveHandle):
    """Is done a while after it was started, whatever its rank does meanwhile."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._done = clock.time + TAKES

    @property
    def finished_at(self) -> float | None:
        return self._done

    def wait(self) -> None:
        self._clock.time = max(self._clock.time, self._done)


class LateCollectives(Collectives):
    """The other ranks contribute nothing, and that late."""

    def __init__(self, clock: Clock, grid: ProcessGrid) -> None:
        super().__init__(grid, 0)
        self._clock = clock

    def _group(self, ranks: tuple[int, ...], axes: Any) -> Any:
        return None

    def _all_reduce(self, tensor: torch.Tensor, group: CollectiveGroup, operation: Operation) -> CollectiveHandle:
        return LateWork(self._clock)

    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: CollectiveGroup) -> CollectiveHandle:
        return LateWork(self._clock)


class _Tick(torch.autograd.Function):
    """Lets a second pass for each row, in forward or in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: Clock, forward: bool) -> torch.Tensor:
        ctx.clock, ctx.backward_seconds = clock, 0 if forward else x.shape[0]
        clock.pass_by(x.shape[0] if forward else 0)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.clock.pass_by(ctx.backward_seconds)
        return gradient, None, None


class Block(nn.Module):
    """Two layers as in a feed-forward, whose products take time: one collective in forward, one in backward."""

    def __init__(self, clock: Clock, context: TensorContext) -> None:
        super().__init__()
        self.clock = clock
        self.first = tensor.Linear(4, 4, bias=False, context=context)
        self.second = tensor.Linear(4, 4, bias=False, context=context, layout=TRANSPOSED)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second):
            x = _Tick.apply(layer(_Tick.apply(x, self.clock, True)), self.clock, False)  # type: ignore[no-untyped-call]
        return x


class Blocks:
    """A `PipelineModel`."""

    ties: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, clock: Clock) -> None:
        self.layers = [Layer(name=f"block{i}", build=partial(Block, clock), cost=1.0) for i in range(BLOCKS)]

    def check(self, grid: ProcessGrid) -> None:
        return None

    def initial(self, name: str) -> Initial:
        return Normal(0.5)

    def activation(
        self, layer: int, microbatch_size: int, dtype: torch.dtype, context: TensorContext
    ) -> tuple[TensorSpec, ...]:
        return (TensorSpec((microbatch_size, 4), dtype),)

    def loss(self, output: Any, targets: torch.Tensor, context: TensorContext) -> torch.Tensor:
        loss: torch.Tensor = (output - targets).square().mean()
        return loss


def spans_of_a_batch(sub_shards: int, monkeypatch: pytest.MonkeyPatch) -> list[Span]:
    clock = Clock()
    monkeypatch.setattr(SpanRecorder, "now", staticmethod(clock.now))

    def add_product(weight: nn.Parameter, rows: torch.Tensor, inputs: torch.Tensor) -> None:
        clock.pass_by(inputs.shape[0])
        weight.grad = rows @ inputs if weight.grad is None else weight.grad + rows @ inputs

    monkeypatch.setattr("axonn.tensor.layers.linear.add_product", add_product)
    grid = ProcessGrid(col=2)
    spans = SpanRecorder(0)
    engine = Engine(
        Blocks(clock),
        grid=grid,
        batch_size=MICROBATCHES * ROWS,
        microbatch_size=ROWS,
        overdecomposition=sub_shards,
        collectives=LateCollectives(clock, grid),
        spans=spans,
    )
    rows = torch.ones(MICROBATCHES * ROWS, 4)
    engine.evaluate_batch(rows, rows)
    assert spans.spans == []
    engine.train_batch(rows, rows)
    return spans.spans


# In forward every block ends with a collective; in backward every one but the first begins one before its last product.
IN_FORWARD, IN_BACKWARD = TAKES * BLOCKS, TAKES * (BLOCKS - 1)
COMPUTED = 3 * 2 * ROWS * BLOCKS


def test_one_sub_shard_hides_the_input_gradient_under_the_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    found = overlap(spans_of_a_batch(1, monkeypatch))
    expected = Overlap(
        compute=COMPUTED, collective=IN_FORWARD + IN_BACKWARD, hidden=IN_BACKWARD, hideable=IN_FORWARD + IN_BACKWARD
    )
    assert found == pytest.approx([MICROBATCHES * seconds for seconds in expected])


def test_two_sub_shards_hide_all_but_the_last_of_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each collective takes just as long as the other sub-shard computes meanwhile."""
    found = overlap(spans_of_a_batch(2, monkeypatch))
    taken = 2 * (IN_FORWARD + IN_BACKWARD)
    expected = Overlap(compute=COMPUTED, collective=taken, hidden=taken - TAKES, hideable=taken)
    assert found == pytest.approx([MICROBATCHES * seconds for seconds in expected])
    assert found.hidden_share == found.reached == pytest.approx(1 - TAKES / taken)


@pytest.mark.parametrize("sub_shards", [1, 2, 4])
def test_each_instant_is_recorded_once(sub_shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = spans_of_a_batch(sub_shards, monkeypatch)
    computed = sorted((s.start, s.end) for s in spans if s.kind in COMPUTE)
    assert all(first[1] <= second[0] for first, second in pairwise(computed))
    assert sum(end - start for start, end in computed) == MICROBATCHES * COMPUTED
    collectives = [s for s in spans if s.kind == SpanKind.TENSOR]
    assert len(collectives) == MICROBATCHES * sub_shards * (2 * BLOCKS - 1)
    assert {s.end - s.start for s in collectives} == {TAKES}
    assert {(s.microbatch, s.chunk, s.layer) for s in collectives} == {(m, 0, 0) for m in range(MICROBATCHES)}
    parts = breakdown(spans)
    found = overlap(spans)
    assert parts.compute == found.compute
    assert parts.tensor == found.collective - found.hidden
    assert parts.unexplained == 0


# --- of spans alone


def span(kind: SpanKind, start: float, end: float, *, rank: int = 0, microbatch: int = 0) -> Span:
    return Span(rank, kind, 0, microbatch, 0, -1, start, end, 0)


def test_overlap_counts_each_instant_once_and_bounds_it_by_task() -> None:
    spans = [
        span(SpanKind.FORWARD, 0, 2),
        span(SpanKind.TENSOR, 1, 4),
        span(SpanKind.TENSOR, 2, 6),
        span(SpanKind.FORWARD, 5, 7),
        # Another task, with more collectives than compute.
        span(SpanKind.BACKWARD, 10, 11),
        span(SpanKind.TENSOR, 11, 19),
        span(SpanKind.BACKWARD, 19, 20),
        # Outside of all tasks.
        span(SpanKind.TENSOR, -3, -2),
        span(SpanKind.TENSOR, 8, 9),
        span(SpanKind.TENSOR, 30, 31),
        span(SpanKind.OPTIMIZER, 30, 31),
    ]
    expected = Overlap(compute=4 + 2, collective=5 + 8 + 3, hidden=1 + 1, hideable=4 + 2)
    assert overlap(spans) == pytest.approx(expected)
    assert overlap(spans[::-1]) == pytest.approx(expected)
    assert (expected.hidden_share, expected.reached) == (2 / 16, 2 / 6)
    # A rank without collectives counts in the mean.
    other = [s._replace(rank=1) for s in spans if s.kind in COMPUTE]
    assert overlap(spans + other) == pytest.approx([6, 8, 1, 3])


def test_nothing_hides_nothing() -> None:
    assert overlap([]) == (0, 0, 0, 0)
    found = overlap([span(SpanKind.FORWARD, 0, 1)])
    assert (found.compute, found.hidden_share, found.reached) == (1, 0, 1)


# --- in real runs

CASE = Case(row=2, col=2, microbatches=2, recompute=1)


def spans_of_a_step(comm: MPI.Intracomm, sub_shards: int) -> tuple[list[Span], int]:
    """A job of the rank pool: the spans of an evaluation and a step, and the step's collectives along row and col."""
    case = replace(CASE, sub_shards=sub_shards)
    with connect(case.grid, comm=comm) as runtime:
        engine = make_engine(case, runtime.rank, runtime.transport, runtime.collectives)
        batch = batch_of(case, 0)
        engine.evaluate_batch(*batch)
        before = runtime.collectives.calls.copy()
        engine.train_batch(*batch)
        calls = runtime.collectives.calls - before
        assert engine.spans is not None
        return engine.spans.spans, sum(calls[c] for c in calls if c.axes in (("row",), ("col",)))


@pytest.mark.parametrize("sub_shards", [1, 2])
def test_every_collective_of_a_step_has_a_span_and_none_of_an_evaluation(pool: RankPool, sub_shards: int) -> None:
    for rank, (spans, calls) in enumerate(pool.run(spans_of_a_step, sub_shards, ranks=4)):
        collectives = [s for s in spans if s.kind == SpanKind.TENSOR]
        assert len(collectives) == calls > 0
        computed = sorted((s.start, s.end) for s in spans if s.kind in COMPUTE)
        assert all(first[1] <= second[0] for first, second in pairwise(computed))
        tasks = [[s for s in spans if s.kind == kind and s.microbatch == m] for kind in COMPUTE for m in range(2)]
        windows = [(min(s.start for s in task), max(s.end for s in task)) for task in tasks]
        assert all(any(a <= s.start <= s.end <= b for a, b in windows) for s in collectives), rank
        found = overlap(spans)
        assert 0 <= found.hidden <= found.hideable <= found.collective
