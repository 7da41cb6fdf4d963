"""What runs issue is what the model of the communication says, on every rank, to the last element."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from axonn.config.train_config import PrecisionConfig
from axonn.distributed.collectives import Call, Collectives
from axonn.distributed.runtime import connect
from axonn.distributed.transport import InProcessCollectives, InProcessTransport, InProcessWorld, Transport
from axonn.distributed.transport.base import SentMessage
from axonn.grid import AXES, ProcessGrid
from axonn.models.registry import outline_of
from axonn.observability.traffic import Traffic, sent_by_axis
from axonn.perf.timing.communication import Collective, StageMessage, Training
from axonn.schedules import ChunkLayout
from tests.helpers.pairwise import pairwise_cover
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import ROWS, Case, batch_of, make_engine, optimizer_of


@dataclass
class Issued:
    """What one rank issued for one batch."""

    collectives: Counter[Call] = field(default_factory=Counter)
    messages: Counter[SentMessage] = field(default_factory=Counter)
    decisions: int = 0


@dataclass
class Recorded:
    """What one rank issued for an evaluation and for a training step, and how the model was cut."""

    spans: list[range]
    layout: ChunkLayout
    evaluation: Issued = field(default_factory=Issued)
    step: Issued = field(default_factory=Issued)
    traffic: list[Traffic] = field(default_factory=list)
    applied: bool = True


def shard_of(case: Case, step: int, rows: range) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    inputs, targets = batch_of(case, step)
    parts = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(t[rows.start : rows.stop] for t in parts), targets[rows.start : rows.stop]


def issued(collectives: Collectives, transport: Transport | None, run: Callable[[], Any]) -> tuple[Issued, Any]:
    """What `run` issues, and what it returns."""
    before = collectives.calls.copy(), Counter() if transport is None else transport.calls.copy()
    told = 0 if transport is None else transport.decisions.messages
    result = run()
    found = Issued(collectives.calls - before[0])
    if transport is not None:
        found.messages = transport.calls - before[1]
        found.decisions = transport.decisions.messages - told
    return found, result


def record(case: Case, rank: int, transport: Transport | None, collectives: Collectives) -> Recorded:
    engine = make_engine(case, rank, transport, collectives)
    shard = shard_of(case, 0, engine.shard(0))
    found = Recorded(engine.virtual_spans, engine.layout)
    found.evaluation, _ = issued(collectives, transport, lambda: engine.evaluate_batch(*shard))
    found.step, result = issued(collectives, transport, lambda: engine.train_batch(*shard))
    found.applied = result.applied
    found.traffic = engine.traffic()
    return found


def record_in_process(case: Case) -> list[Recorded]:
    world = InProcessWorld(case.grid.size)

    def run(rank: int) -> Recorded:
        collectives = InProcessCollectives(world, case.grid, rank)
        return record(case, rank, InProcessTransport(world, rank), collectives)

    return world.run(run)


def record_over_gloo(comm: Any, case: Case) -> Recorded:
    """A job of the rank pool."""
    with connect(case.grid, comm=comm, transport=case.transport) as runtime:
        return record(case, runtime.rank, runtime.transport, runtime.collectives)


def modelled(case: Case, recorded: Recorded) -> Training:
    parts = case.sub_shards or (2 if case.grid.tensor > 1 and ROWS // case.data > 1 else 1)
    return Training(
        outline=outline_of(case.model),
        grid=case.grid,
        batch_size=case.batch,
        microbatch_size=ROWS // case.data,
        sub_shards=parts,
        layout=recorded.layout,
        spans=recorded.spans,
        # Of a GPT the same is computed again however many blocks are together.
        recompute=1 if case.recompute == "auto" else case.recompute,
        precision=case.precision or PrecisionConfig(compute=case.dtype),  # type: ignore[arg-type]
        optimizer=optimizer_of(case),
    )


def as_modelled(calls: Counter[Call]) -> Counter[Collective]:
    return Counter({Collective(c.kind, c.axes, c.ranks, c.elements, c.dtype): n for c, n in calls.items()})


def as_recorded(messages: Counter[StageMessage]) -> Counter[SentMessage]:
    return Counter({SentMessage(m.peer, m.direction, m.elements, m.bytes): n for m, n in messages.items()})


def check(case: Case, recorded: list[Recorded]) -> None:
    """Every rank, both ways: nothing is missing, and nothing else is issued."""
    assert len(recorded) == case.grid.size
    driven = case.schedule.startswith("message-driven")
    kinds = 3 if "zero-bubble" in case.schedule else 2
    for rank, found in enumerate(recorded):
        model = modelled(case, found)
        assert as_modelled(found.step.collectives) == model.step(rank), rank
        assert as_modelled(found.evaluation.collectives) == model.evaluation(rank), rank
        assert found.step.messages == as_recorded(model.messages(rank)), rank
        assert found.evaluation.messages == as_recorded(model.messages(rank, training=False)), rank
        assert found.step.decisions == (model.decisions(rank, kinds=kinds) if driven else 0), rank
        # In one chunk the microbatches of an evaluation come in their order; nothing is to be decided.
        assert found.evaluation.decisions == (model.decisions(rank, kinds=1) if case.chunks > 1 else 0), rank
        check_volume(model, rank, found)


def check_volume(model: Training, rank: int, found: Recorded) -> None:
    """The engine's own table adds up to what the model says each axis carries."""
    if not found.applied:
        return
    sent = sent_by_axis(part for part in found.traffic if part.kind != "decision")
    everything = "+".join(AXES)
    expected = {"all" if axis == everything else axis: v.bytes for axis, v in model.volume(rank).items()}
    assert sent == {axis: round(size) for axis, size in expected.items()}


TWOS = [ProcessGrid(data=d, inter=i, row=r, col=c) for d in (1, 2) for i in (1, 2) for r in (1, 2) for c in (1, 2)]
GRIDS = [*TWOS, *(ProcessGrid(row=r, col=c) for r, c in ((1, 4), (4, 1), (2, 4), (4, 2)))]
PARAMETERS: dict[str, list[Any]] = {
    "model_kind": ["gpt", "unet"],
    "grid": GRIDS,
    "recompute": [None, 1, 2],
    "tied": [False, True],
    "sub_shards": [1, 2],
    "optimizer": [(None, 1), (0.05, 4), (0.05, None)],
    "precision": [
        PrecisionConfig(compute="float64"),
        PrecisionConfig(compute="bfloat16", gradients="float32"),
        PrecisionConfig(compute="float16"),
    ],
}


def allowed(row: dict[str, Any]) -> bool:
    return row["model_kind"] == "gpt" or not row["tied"]


def case_of(row: dict[str, Any]) -> Case:
    values = dict(row)
    grid = values.pop("grid")
    clip, k = values.pop("optimizer")
    extents = {axis: grid.extent(axis) for axis in AXES}
    return Case(**extents, microbatches=2, clip=clip, k=k, **values)


COVER = pairwise_cover(PARAMETERS, allowed)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("model_kind", ["gpt", "unet"])
def test_every_collective_of_a_run_is_modelled_and_every_modelled_one_issued(
    model_kind: str, grid: ProcessGrid
) -> None:
    rows = [row for row in COVER if row["grid"] == grid and row["model_kind"] == model_kind]
    assert rows
    for row in rows:
        case = case_of(row)
        check(case, record_in_process(case))


SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "gpipe"},
    {"schedule": "interleaved-1f1b", "chunks": 2},
    {"schedule": "zero-bubble"},
    {"schedule": "zero-bubble", "chunks": 2, "placement": "v"},
    {"schedule": "message-driven", "chunks": 2},
    {"schedule": "message-driven-zero-bubble", "recompute": "auto"},
]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_no_schedule_and_no_placement_of_chunks_changes_more_than_who_computes_what(options: dict[str, Any]) -> None:
    """With sub-shards of unequal size, and one group of ranks that is no square."""
    case = Case(inter=2, row=2, microbatches=4, tied=True, sub_shards=3, **options)
    check(case, record_in_process(case))


GLOO = [
    Case(data=2, row=2, col=2, model_kind="unet", recompute=1, clip=0.05, dtype="float32"),
    Case(inter=2, row=2, col=2, tied=True, precision=PrecisionConfig(compute="bfloat16", loss_scale=2.0)),
    Case(data=2, inter=4, microbatches=3, tied=True, transport="torch"),
]


@pytest.mark.parametrize("case", GLOO, ids=lambda case: str(case.grid))
def test_over_real_ranks_too(case: Case, pool: RankPool) -> None:
    check(case, pool.run(record_over_gloo, case, ranks=case.grid.size))
