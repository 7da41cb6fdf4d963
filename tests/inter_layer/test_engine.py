"""The engine's own promises: what it refuses, what `compute_gradients` leaves alone, and the spans of a batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from axonn.distributed.transport import InProcessCollectives, InProcessTransport, InProcessWorld
from axonn.engine import Engine, microbatches_of
from axonn.errors import ConfigError, GridError
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_model import GPT
from axonn.schedules import ScheduleSpec
from axonn.spans import Span, SpanKind
from tests.helpers.training import CHUNK, ROWS, Case, batch_of, make_engine

CASE = Case(data=2, inter=2, microbatches=3)


def shard_of(engine: Engine, case: Case, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rows = engine.shard(0)
    inputs, targets = (t[rows.start : rows.stop] for t in batch_of(case, step))
    return inputs, targets


def engine_in(world: InProcessWorld, case: Case, rank: int) -> Engine:
    return make_engine(case, rank, InProcessTransport(world, rank), InProcessCollectives(world, case.grid, rank))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grid": ProcessGrid(inter=2)}, ConfigError, "G_inter = 2 needs a transport"),
        ({"grid": ProcessGrid(data=2)}, ConfigError, "2 ranks need collectives"),
        ({"grid": ProcessGrid(row=5)}, GridError, r"hidden \(24\) of .* along row = 5; .* work: G_row=6, G_col=1"),
        ({"overdecomposition": 5}, GridError, "into more sub-shards than its 2 rows"),
        ({"rank": 1}, GridError, "rank 1 is not in the grid"),
        ({"device": torch.device("cuda")}, ConfigError, "device 'cuda' needs a GPU"),
        ({"schedule": ScheduleSpec(name="none")}, ConfigError, "unknown schedule 'none'"),
        ({"batch_size": 9}, GridError, "batch_size 9 is not a multiple"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"grid": ProcessGrid(), "batch_size": 8, "microbatch_size": 2}
    with pytest.raises(error, match=message):
        Engine(GPT(CASE.model), **(arguments | options))


def test_more_stages_than_layers_are_refused() -> None:
    world = InProcessWorld(15)
    with pytest.raises(GridError, match="15 stages are more than the 14 into which this model can be cut"):
        engine_in(world, Case(inter=15), 0)


def test_microbatches_of_a_batch() -> None:
    assert microbatches_of(batch_size=24, microbatch_size=3, grid=ProcessGrid(data=2, inter=5)) == 4
    with pytest.raises(GridError, match="change one of the three"):
        microbatches_of(batch_size=25, microbatch_size=3, grid=ProcessGrid(data=2))


def test_the_rows_of_a_shard_are_checked() -> None:
    engine = make_engine(Case(microbatches=2), 0, None, None)
    inputs, targets = shard_of(engine, Case(microbatches=2))
    for wrong in ((None, targets), (inputs, None), (inputs[1:], targets), (inputs, targets[1:])):
        for call in (engine.train_batch, engine.evaluate_batch, engine.compute_gradients):
            with pytest.raises(ConfigError, match=r"rank 0 needs (in|tar)\w+ of 8 rows .*, got (None|7 rows)"):
                call(*wrong)
    assert engine.held_microbatches == 0


def test_gradients_alone_change_no_parameter_and_do_not_add_up() -> None:
    """An earlier batch leaves nothing in the gradients of the next, and a step does not divide them again."""
    world = InProcessWorld(CASE.grid.size)

    def body(rank: int) -> None:
        engine = engine_in(world, CASE, rank)
        start = {s.name: s.parameter.detach().clone() for s in engine.specs}
        results = []
        for step in (0, 1, 0):
            loss = engine.compute_gradients(*shard_of(engine, CASE, step))
            gradients = {s.name: s.parameter.grad.clone() for s in engine.specs if s.parameter.grad is not None}
            results.append((loss, gradients))
        assert all(torch.equal(s.parameter, start[s.name]) for s in engine.specs)
        assert results[0][0] == results[2][0] != results[1][0]
        assert results[0][1].keys() == start.keys()
        assert all(torch.equal(results[0][1][name], results[2][1][name]) for name in start)
        assert not all(torch.equal(results[0][1][name], results[1][1][name]) for name in start)

    world.run(body)


def test_a_failed_batch_can_be_told_from_its_rank() -> None:
    """A rank that lacks its targets fails; the others do not wait for ever."""
    world = InProcessWorld(CASE.grid.size)

    def body(rank: int) -> None:
        engine = engine_in(world, CASE, rank)
        inputs, targets = shard_of(engine, CASE)
        engine.train_batch(inputs, None if rank == 3 else targets)

    with pytest.raises(ConfigError, match="rank 3 needs targets"):
        world.run(body)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_batch_leaves_one_span_for_each_task_and_message(steps: int) -> None:
    world = InProcessWorld(CASE.grid.size)

    def body(rank: int) -> tuple[list[Span], int]:
        engine = engine_in(world, CASE, rank)
        for step in range(steps):
            engine.train_batch(*shard_of(engine, CASE, step))
        assert engine.spans is not None
        return engine.spans.spans, sum(s.parameter.numel() for s in engine.specs)

    for rank, (spans, parameters) in enumerate(world.run(body)):
        chunks = -(-parameters // CHUNK)
        assert {s.rank for s in spans} == {rank}
        assert all(s.end >= s.start for s in spans)
        first = CASE.grid.is_first_stage(rank)
        for step in range(steps):
            mine = [s for s in spans if s.step == step]
            count = Counter((s.kind, s.microbatch) for s in mine)
            for microbatch in range(CASE.microbatches):
                assert count[SpanKind.FORWARD, microbatch] == 1
                assert count[SpanKind.BACKWARD, microbatch] == 1
                assert count[SpanKind.SEND, microbatch] == 1
            # The optimizer's first zeroes the gradients of the batch before.
            assert count[SpanKind.OPTIMIZER, -1] - 1 == count[SpanKind.ALL_REDUCE, -1] == chunks
            # Waiting for the loss is waiting for the other ranks.
            assert count[SpanKind.IDLE, -1] == 1
            directions = {s.direction for s in mine if s.kind == SpanKind.SEND}
            assert directions == {0 if first else 1}
            waits = [s for s in mine if s.kind == SpanKind.RECEIVE_WAIT]
            assert {s.direction for s in waits} <= {1 if first else 0}
            # Work with messages lies before each task and each wait, and after the last of them.
            assert count[SpanKind.MESSAGES, -1] == 2 * CASE.microbatches + len(waits) + 1


def test_shards_have_rows_for_every_microbatch() -> None:
    engine = make_engine(Case(microbatches=5), 0, None, None)
    assert engine.microbatches == 5
    assert engine.shard(2) == range(2 * 5 * ROWS, 3 * 5 * ROWS)
