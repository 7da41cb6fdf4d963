"""The same seed and grid give the same bits on a CPU, whatever time messages take and whatever else is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mpi4py import MPI

from axonn.checkpoint import latest
from axonn.config import CheckpointConfig, DataConfig, EvaluationConfig, GridConfig, OptimizerConfig
from axonn.weights import read_weights
from experiments.resumption import CHECKPOINTS
from experiments.supervisor import supervise
from tests.command_line import TEXT, tiny
from tests.rank_pool import RankPool
from tests.test_agreement import train_unevenly
from tests.test_equality import check_same_bits
from tests.training import Case, Outcome, train_over_mpi

CASES = [
    Case(inter=2, col=2, microbatches=6, dtype="float32", dropout=0.1, clip=0.5, steps=2),
    Case(data=2, inter=2, microbatches=7, dtype="float32", tied=True, offloaded=True, k=1, steps=2),
    Case(
        inter=4,
        microbatches=6,
        dtype="bfloat16",
        schedule="message-driven-zero-bubble",
        chunks=2,
        placement="v",
        recompute=1,
        steps=3,
    ),
    Case(model_kind="unet", inter=2, row=2, microbatches=4, dtype="float32", dropout=0.1, steps=2),
]


def train_late(comm: MPI.Intracomm, case: Case, seed: int) -> Outcome:
    """A job of the rank pool: messages take other times with each seed."""
    return train_unevenly(comm, case, seed)[0]


@pytest.mark.parametrize("transport", ["mpi", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model_kind} {case.grid}")
def test_the_time_that_messages_take_changes_no_bit(case: Case, transport: str, pool: RankPool) -> None:
    case = replace(case, transport=transport)
    first, second = (pool.run(train_late, case, seed, ranks=case.grid.size, timeout_s=300) for seed in (1, 2))
    check_same_bits(first, second)


@pytest.mark.parametrize(
    "case",
    [
        Case(row=2, col=2, microbatches=2, dtype="float32", dropout=0.1, steps=3),
        Case(model_kind="unet", data=2, row=2, col=2, microbatches=2, dtype="float32", steps=2),
        Case(data=4, microbatches=2, dtype="bfloat16", offloaded=True, clip=0.5, steps=3),
    ],
    ids=lambda case: f"{case.model_kind} {case.grid}",
)
def test_collectives_change_no_bit(case: Case, pool: RankPool) -> None:
    first, second = (pool.run(train_over_mpi, case, ranks=case.grid.size) for _ in range(2))
    check_same_bits(first, second)


def test_two_runs_leave_the_same_losses_and_weights(tmp_path: Path) -> None:
    """As `axonn train` makes them, in two places."""
    config = tiny(
        steps=20,
        data=DataConfig(path=str(TEXT)),
        optimizer=OptimizerConfig(clip_norm=1.0),
        evaluation=EvaluationConfig(every=5),
        checkpoints=CheckpointConfig(every=10),
    ).model_copy(update={"grid": GridConfig(data=2)})
    outcomes = [supervise("axonn", config, tmp_path / name, timeout_s=250) for name in ("one", "two")]
    assert all(outcome.failure is None for outcome in outcomes)
    assert outcomes[0].losses == outcomes[1].losses
    weights = []
    for name in ("one", "two"):
        newest = latest(tmp_path / name / CHECKPOINTS)
        assert newest is not None
        weights.append(read_weights(newest.folder))
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert (tmp_path / "one" / "evaluations.jsonl").read_text().count("\n") == 4
