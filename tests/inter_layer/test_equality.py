"""Training on a grid equals serial training: losses, gradients of every step, parameters, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from mpi4py import MPI

from axonn.distributed.collectives import TorchCollectives
from axonn.distributed.runtime import connect
from axonn.distributed.transport import InProcessCollectives, InProcessTransport, InProcessWorld
from axonn.distributed.transport.mpi import MPITransport
from tests.helpers.comparing import check_every_rank, check_gradients, check_parameters, check_same_bits
from tests.helpers.pairwise import full_product, pairs_of, pairwise_cover
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import (
    Case,
    Outcome,
    make_engine,
    serial_reference,
    train_in_process,
    train_over_mpi,
    train_step,
)

SCHEDULES: dict[str, dict[str, Any]] = {
    "message-driven": {},
    "message-driven, one in flight": {"limit": 1, "pick": "forward-first"},
    "message-driven, by arrival": {"limit": 3, "pick": "arrival-order"},
    "message-driven, in 1F1B's order": {"limit": 4, "pick": "1f1b"},
    "message-driven, V": {"chunks": 2, "placement": "v"},
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b"},
    "interleaved-1f1b": {"schedule": "interleaved-1f1b", "chunks": 2},
    "zero-bubble": {"schedule": "zero-bubble"},
    "zero-bubble, V": {"schedule": "zero-bubble", "chunks": 2, "placement": "v"},
    "message-driven-zero-bubble": {"schedule": "message-driven-zero-bubble"},
    "message-driven-zero-bubble, V": {"schedule": "message-driven-zero-bubble", "chunks": 2, "placement": "v"},
    "message-driven-zero-bubble, loops": {"schedule": "message-driven-zero-bubble", "chunks": 3, "limit": 3},
}
ALONE = ("message-driven", "zero-bubble, V")
"""Schedules of grids of one stage, on which all of them run much the same."""
PARAMETERS = {
    "grid": [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)],
    "schedule": list(SCHEDULES),
    "transport": ["mpi", "torch", "in-process"],
    "microbatches": [1, 2, 3, 5, 8],
    "dtype": ["float64", "float32"],
    "tied": [False, True],
}
OPTIONS = {
    "schedule": list(SCHEDULES),
    "tied": [False, True],
    "recompute": [None, 1],
    "offloaded": [False, True],
    "k": [1, 4],
}
"""What changes memory and the optimizer; the rest goes round with the number of the row."""


def possible(row: dict[str, Any]) -> bool:
    """At most eight ranks, and a layer for every chunk (the model has 14); interleaving wants whole rounds."""
    data, inter = row["grid"]
    return bool(data * inter <= 8)


def worth_it(row: dict[str, Any]) -> bool:
    """Whether a row is more than another one under another name."""
    return possible(row) and (row["grid"][1] > 1 or row["schedule"] in ALONE)


def name_of(row: dict[str, Any]) -> str:
    (data, inter), head = row["grid"], "tied" if row["tied"] else "untied"
    name = f"{data}x{inter}-{row['schedule']}-{row['transport']}-{row['microbatches']}mb-{row['dtype']}-{head}"
    said = {"recompute": "recompute {}", "offloaded": "offloaded", "k": "k{}", "clip": "clipped"}
    return "-".join([name, *(text.format(row[key]) for key, text in said.items() if row.get(key))])


def with_the_rest(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """The other parameters of a row of OPTIONS."""
    rest = {
        "grid": [(1, 4), (2, 2), (1, 2), (2, 4), (4, 2), (4, 1)][number % (6 if row["schedule"] in ALONE else 5)],
        "transport": PARAMETERS["transport"][number % 3],
        "microbatches": 1 + number % 8,
        "dtype": PARAMETERS["dtype"][number % 5 == 0],
        "clip": None if number % 2 else 0.1,
    }
    if rest["microbatches"] % 3 == 0 and row["recompute"]:
        rest["recompute"] = "auto"
    return row | rest


COVER = pairwise_cover(PARAMETERS, worth_it)
REST = [row for row in full_product(PARAMETERS, possible) if row not in COVER]
COVER_OF_OPTIONS = [with_the_rest(i, row) for i, row in enumerate(pairwise_cover(OPTIONS))]
REST_OF_OPTIONS = [with_the_rest(i, row) for i, row in enumerate(full_product(OPTIONS))]


def check_row(row: dict[str, Any], pool: RankPool) -> None:
    data, inter = row["grid"]
    case = Case(
        data=data,
        inter=inter,
        microbatches=row["microbatches"],
        dtype=row["dtype"],
        tied=row["tied"],
        transport="mpi" if row["transport"] == "in-process" else row["transport"],
        **{key: row[key] for key in ("recompute", "offloaded", "k", "clip") if key in row},
        **SCHEDULES[row["schedule"]],
    )
    if row["transport"] != "in-process":
        outcomes = pool.run(train_over_mpi, case, ranks=case.grid.size)
    else:
        outcomes = train_in_process(case, order_seed=case.microbatches)
    check_every_rank(case, outcomes)


@pytest.mark.parametrize("row", COVER, ids=name_of)
def test_a_grid_trains_like_one_rank(row: dict[str, Any], pool: RankPool) -> None:
    check_row(row, pool)


@pytest.mark.full
@pytest.mark.parametrize("row", REST, ids=name_of)
def test_every_grid_trains_like_one_rank(row: dict[str, Any], pool: RankPool) -> None:
    check_row(row, pool)


@pytest.mark.parametrize("row", COVER_OF_OPTIONS, ids=name_of)
def test_options_change_memory_and_not_the_training(row: dict[str, Any], pool: RankPool) -> None:
    check_row(row, pool)


@pytest.mark.full
@pytest.mark.parametrize("row", REST_OF_OPTIONS, ids=name_of)
def test_every_combination_of_options_trains_like_one_rank(row: dict[str, Any], pool: RankPool) -> None:
    check_row(row, pool)


def test_the_cover_has_every_pair_of_values() -> None:
    def pairs(rows: Sequence[dict[str, Any]]) -> set[Any]:
        numbers = ({name: PARAMETERS[name].index(value) for name, value in row.items()} for row in rows)
        return set().union(*(pairs_of(row) for row in numbers))

    assert pairs(COVER) == pairs(full_product(PARAMETERS, worth_it))
    assert len(COVER) < len(REST) / 20


def test_the_references_differ_from_each_other() -> None:
    """The comparison can fail: other microbatch counts, heads and steps are other runs."""
    case = Case(microbatches=2)
    wrong = serial_reference(Case(microbatches=3))
    with pytest.raises(AssertionError):
        check_every_rank(case, [wrong])
    short = serial_reference(Case(microbatches=2, steps=4))
    right = serial_reference(case)
    check_every_rank(case, [right])
    with pytest.raises(AssertionError, match="on rank 0"):
        check_parameters(case, 0, short, right.parameters)
    with pytest.raises(AssertionError, match="on rank 0 in step 0"):
        check_gradients(case, 0, 0, right, right.gradients[1])


def test_the_parts_of_another_rank_are_told_apart() -> None:
    case = Case(col=2, microbatches=2)
    outcomes = train_in_process(case)
    check_every_rank(case, outcomes)
    with pytest.raises(AssertionError, match="on rank 0"):
        check_every_rank(case, outcomes[::-1])


# --- the same bits


REPEATED = Case(data=2, inter=4, microbatches=7, dtype="float32", tied=True)


def test_a_run_over_mpi_repeats_to_the_bit(pool: RankPool) -> None:
    first, second = (pool.run(train_over_mpi, REPEATED, ranks=8) for _ in range(2))
    check_same_bits(first, second)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_order_of_messages_does_not_change_a_bit(schedule: str) -> None:
    case = Case(data=2, inter=4, microbatches=6, dtype="float32", steps=2, **SCHEDULES[schedule])
    first = train_in_process(case)
    check_same_bits(first, train_in_process(case))
    for seed in range(4):
        check_same_bits(first, train_in_process(case, order_seed=seed))


def test_replicas_stay_the_same_to_the_bit(pool: RankPool) -> None:
    outcomes = pool.run(train_over_mpi, REPEATED, ranks=8)
    for stage in range(4):
        first, second = (outcomes[REPEATED.grid.rank(data=d, inter=stage)].parameters for d in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first | second)
    ends = [outcomes[REPEATED.grid.rank(inter=stage)].parameters for stage in (0, 3)]
    assert torch.equal(*(end["embedding.tokens.weight"] for end in ends))


# --- two grids in one process

TOGETHER = (Case(data=2, inter=2, microbatches=3), Case(inter=4, microbatches=5, tied=True, schedule="1f1b"))


def train_two_grids_over_mpi(comm: MPI.Intracomm) -> list[Outcome]:
    """A job of the rank pool: engines on two grids over the same ranks take turns."""
    outcomes = [Outcome() for _ in TOGETHER]
    with connect(TOGETHER[0].grid, comm=comm) as runtime:
        second = MPITransport(comm)
        other = TorchCollectives(TOGETHER[1].grid, runtime.rank)
        engines = [
            make_engine(TOGETHER[0], runtime.rank, runtime.transport, runtime.collectives),
            make_engine(TOGETHER[1], runtime.rank, second, other),
        ]
        for step in range(TOGETHER[0].steps):
            for engine, case, outcome in zip(engines, TOGETHER, outcomes, strict=True):
                train_step(engine, case, step, outcome)
        second.close()
    return outcomes


def test_two_grids_take_turns_over_mpi(pool: RankPool) -> None:
    by_rank = pool.run(train_two_grids_over_mpi, ranks=4)
    for number, case in enumerate(TOGETHER):
        check_every_rank(case, [outcomes[number] for outcomes in by_rank])


@pytest.mark.parametrize("cases", [TOGETHER, (TOGETHER[0], TOGETHER[0])], ids=["two grids", "one grid twice"])
def test_two_engines_take_turns_in_process(cases: Sequence[Case]) -> None:
    world = InProcessWorld(4, order_seed=5)

    def body(rank: int) -> list[Outcome]:
        engines = [
            make_engine(case, rank, InProcessTransport(world, rank), InProcessCollectives(world, case.grid, rank))
            for case in cases
        ]
        outcomes = [Outcome() for _ in cases]
        for step in range(cases[0].steps):
            for engine, case, outcome in zip(engines, cases, outcomes, strict=True):
                train_step(engine, case, step, outcome)
        return outcomes

    by_rank = world.run(body)
    for number, case in enumerate(cases):
        check_every_rank(case, [outcomes[number] for outcomes in by_rank])
