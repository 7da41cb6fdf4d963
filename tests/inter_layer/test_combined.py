"""All kinds of parallelism at once equal serial training, for both models, on every rank."""

from __future__ import annotations

from functools import partial
from itertools import product
from math import prod
from typing import Any

import pytest

from tests.helpers.comparing import check_every_rank, check_replicas
from tests.helpers.pairwise import full_product, pairwise_cover
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import Case, train_in_process, train_over_mpi

GRIDS = [*product((1, 2), repeat=4), *((1, 1, row, col) for row, col in [(1, 4), (4, 1), (2, 4), (4, 2)])]
"""data, inter, row, col."""
SCHEDULES: dict[str, dict[str, Any]] = {
    "message-driven": {},
    "message-driven, by arrival, V": {"pick": "arrival-order", "chunks": 2, "placement": "v"},
    "1f1b": {"schedule": "1f1b"},
    "zero-bubble": {"schedule": "zero-bubble"},
    "message-driven-zero-bubble": {"schedule": "message-driven-zero-bubble"},
}
SOME_GRIDS = [
    (1, 2, 2, 1),
    (2, 1, 1, 2),
    (2, 2, 1, 2),
    (1, 2, 1, 2),
    (1, 1, 2, 2),
    (2, 1, 2, 1),
    (1, 1, 4, 2),
    (2, 2, 2, 2),
]
"""Of which each two axes are cut together."""
PARAMETERS = {
    "grid": SOME_GRIDS,
    "model": ["gpt", "unet"],
    "schedule": list(SCHEDULES),
    "transport": ["in-process", "mpi", "torch"],
    "sub_shards": [1, 2, None],
    "recompute": [None, 1],
    "dropout": [0.0, 0.3],
}
AROUND = {
    "microbatches": [3, 1, 4, 2],
    "tied": [False, True],
    "clip": [None, None, None, 0.05],
    "offloaded": [False, False, True],
    "k": [4, 1, 4, 4, None],
    "dtype": ["float64"] * 6 + ["float32"],
}
"""What goes round with the number of the row."""


def possible(row: dict[str, Any], real_ranks: int = 4) -> bool:
    """Not more real ranks; chunks of a U-Net hand on different tensors, which one edge cannot carry."""
    chunks = SCHEDULES[row["schedule"]].get("chunks", 1)
    real = row["transport"] != "in-process"
    return not (real and prod(row["grid"]) > real_ranks) and (chunks == 1 or row["model"] == "gpt")


def with_the_rest(number: int, row: dict[str, Any]) -> dict[str, Any]:
    rest = {key: values[number % len(values)] for key, values in AROUND.items()}
    return row | rest | ({"tied": False} if row["model"] == "unet" else {})


def name_of(row: dict[str, Any]) -> str:
    said = [row["model"], "x".join(map(str, row["grid"])), row["schedule"], row["transport"]]
    said += [f"n{row['sub_shards']}", "recompute" if row["recompute"] else "", f"dropout{row['dropout']}"]
    return "-".join(part for part in said if part)


COVER = [with_the_rest(i, row) for i, row in enumerate(pairwise_cover(PARAMETERS, possible))]
REST = [
    with_the_rest(i, row)
    for i, row in enumerate(full_product(PARAMETERS | {"grid": GRIDS}, partial(possible, real_ranks=8)))
]


def check_row(row: dict[str, Any], pool: RankPool) -> None:
    data, inter, tensor_row, col = row["grid"]
    case = Case(
        model_kind=row["model"],
        data=data,
        inter=inter,
        row=tensor_row,
        col=col,
        transport="mpi" if row["transport"] == "in-process" else row["transport"],
        steps=3,
        **{key: row[key] for key in ("sub_shards", "recompute", "dropout", *AROUND)},
        **SCHEDULES[row["schedule"]],
    )
    if row["transport"] == "in-process":
        outcomes = train_in_process(case, order_seed=case.microbatches)
    else:
        outcomes = pool.run(train_over_mpi, case, ranks=case.grid.size)
    check_every_rank(case, outcomes)
    check_replicas(case, outcomes)


@pytest.mark.parametrize("row", COVER, ids=name_of)
def test_a_grid_of_all_axes_trains_like_one_rank(row: dict[str, Any], pool: RankPool) -> None:
    check_row(row, pool)


@pytest.mark.parametrize("model", ["gpt", "unet"])
def test_eight_real_ranks_train_like_one(model: Any, pool: RankPool) -> None:
    case = Case(model_kind=model, inter=2, row=2, col=2, microbatches=3, steps=2, dropout=0.1)
    outcomes = pool.run(train_over_mpi, case, ranks=8)
    check_every_rank(case, outcomes)
    check_replicas(case, outcomes)


@pytest.mark.full
@pytest.mark.parametrize("row", REST, ids=name_of)
def test_every_grid_of_all_axes_trains_like_one_rank(row: dict[str, Any], pool: RankPool) -> None:
    check_row(row, pool)
