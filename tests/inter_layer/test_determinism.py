"""The same seed and grid give the same bits on a CPU, whatever time messages take and whatever else is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from axonn.checkpoint.checkpoints import latest
from axonn.config.train_config import CheckpointConfig, DataConfig, EvaluationConfig
from axonn.grid import ProcessGrid
from axonn.models.weights_file import read_weights
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.training.resumption import CHECKPOINTS
from axonn.training.supervision.supervisor import supervise
from tests.helpers import training
from tests.helpers.command_line import TEXT, tiny
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import Case, Outcome, train_in_process, train_over_mpi
from tests.inter_layer.test_agreement import train_unevenly
from tests.inter_layer.test_equality import check_same_bits

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


@pytest.mark.parametrize("transport", ["mpi", pytest.param("torch", marks=pytest.mark.full)])
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


STAGES: dict[str, dict[str, Any]] = {
    "2": {"inter": 2},
    "3, GPipe": {"inter": 3, "schedule": "gpipe"},
    "3, zero-bubble": {"inter": 3, "schedule": "zero-bubble"},
    "4": {"inter": 4},
    "2 in a V": {"inter": 2, "chunks": 2, "placement": "v"},
    "3 in a V, zero-bubble": {"inter": 3, "schedule": "zero-bubble", "chunks": 2, "placement": "v"},
    "2 in three loops, message-driven zero-bubble": {
        "inter": 2,
        "schedule": "message-driven-zero-bubble",
        "chunks": 3,
        "limit": 3,
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "GPT": {},
    # Sizes that are no multiple of a vector's, and parameters that lie elsewhere in buckets on each stage.
    "odd sizes": {"vocab": 61, "heads": 3, "microbatches": 5},
    "clipped": {"clip": 0.05},
    "tied": {"tied": True},
    "tied, clipped, odd sizes": {"tied": True, "clip": 0.05, "vocab": 61},
    "tied, clipped, offloaded": {"tied": True, "clip": 0.05, "offloaded": True, "k": 1},
    "clipped, dropout, recomputed": {"clip": 0.05, "dropout": 0.1, "recompute": 1},
    "clipped, float64": {"clip": 0.05, "dtype": "float64"},
    "clipped, tied, bfloat16": {"clip": 0.05, "tied": True, "dtype": "bfloat16"},
    "U-Net": {"model_kind": "unet"},
    "U-Net, clipped, dropout": {"model_kind": "unet", "clip": 0.05, "dropout": 0.1},
}
OTHER_AXES: dict[str, dict[str, Any]] = {
    "replicas": {"data": 2, "tied": True},
    "tensor": {"row": 2, "col": 2, "tied": True},
    "U-Net": {"model_kind": "unet", "row": 2},
}


def small_case(**changes: Any) -> Case:
    return Case(**{"dtype": "float32", "microbatches": 3, "steps": 3, **changes})


@cache
def on_one_stage(setting: str) -> list[Outcome]:
    return train_in_process(small_case(**SETTINGS[setting]))


def check_stages_change_no_bit(
    one: Sequence[Outcome], case: Case, outcomes: Sequence[Outcome], *, without: Case
) -> None:
    """Compare every rank of `outcomes` with the rank of `one`, whose case is `without` stages, that lies where it does
    on the other axes."""
    assert case.clip is None or all(norm > case.clip for norm in one[0].norms if norm is not None)
    for rank, outcome in enumerate(outcomes):
        here = case.grid.coordinates(rank)
        expected = one[without.grid.rank(data=here.data, inter=0, row=here.row, col=here.col)]
        assert outcome.losses == expected.losses, rank
        assert outcome.evaluations == expected.evaluations, rank
        assert outcome.norms == expected.norms, rank
        assert outcome.masters, rank
        for name, master in outcome.masters.items():
            assert torch.equal(master, expected.masters[name]), f"{name} of rank {rank}"


def stages_and_settings() -> list[Any]:
    """Three ways of cutting go round with the settings; the others are tried by make test-full."""
    found = []
    for number, (setting, changes) in enumerate(SETTINGS.items()):
        # Stages of a U-Net are one piece each.
        possible = [name for name, how in STAGES.items() if "model_kind" not in changes or "chunks" not in how]
        for at, stages in enumerate(possible):
            often = (at - 3 * number) % len(possible) < 3
            found.append(pytest.param(stages, setting, marks=() if often else pytest.mark.full))
    return found


@pytest.mark.parametrize(("stages", "setting"), stages_and_settings())
def test_stages_change_no_bit(stages: str, setting: str) -> None:
    """Against one rank: losses, norms, and the weights of every stage after several steps."""
    without = small_case(**SETTINGS[setting])
    case = replace(without, **STAGES[stages])
    check_stages_change_no_bit(on_one_stage(setting), case, train_in_process(case, order_seed=3), without=without)


@pytest.mark.parametrize("setting", OTHER_AXES)
def test_stages_of_other_axes_change_no_bit(setting: str, pool: RankPool) -> None:
    """As against one rank, against the same replicas and tensor-parallel ranks without stages; over MPI and Gloo."""
    without = small_case(clip=0.05, **OTHER_AXES[setting])
    case = replace(without, inter=2)
    one, outcomes = (pool.run(train_over_mpi, c, ranks=c.grid.size, timeout_s=300) for c in (without, case))
    check_stages_change_no_bit(one, case, outcomes, without=without)


@pytest.mark.full
def test_stages_of_compiled_functions_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "COMPILE", "always")
    without = small_case(clip=0.05)
    case = replace(without, inter=2)
    check_stages_change_no_bit(train_in_process(without), case, train_in_process(case), without=without)


def test_where_the_optimizer_state_lies_changes_no_bit() -> None:
    """Nor do the sizes in which it is updated and gradients are reduced."""
    case = small_case(clip=0.05, tied=True, vocab=61)
    one = train_in_process(case)
    for changes in ({"offloaded": True}, {"offloaded": True, "k": 1}, {"k": None}):
        check_same_bits(one, train_in_process(replace(case, **changes)))


def test_two_runs_leave_the_same_losses_and_weights(tmp_path: Path) -> None:
    """As `axonn train` makes them, in two places."""
    config = tiny(
        steps=20,
        data=DataConfig(path=str(TEXT)),
        optimizer=AdamWConfig(clip_norm=1.0),
        evaluation=EvaluationConfig(every=5),
        checkpoints=CheckpointConfig(every=10),
    ).model_copy(update={"grid": ProcessGrid(data=2)})
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
