"""PyTorch's data parallelism trains as a plain loop over the whole batch does, and communicates once per batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from mpi4py import MPI
from torch.profiler import profile

from axonn.config.train_config import TrainConfig
from axonn.distributed.runtime import connect
from axonn.grid import ProcessGrid
from axonn.schedules import ChunkLayout
from baselines.adapters.pytorch.pytorch_data import TorchDDP, TorchFullyShard
from tests.helpers.equal_work import check, config_of, model_of
from tests.helpers.rank_pool import RankPool

DATA_PARALLEL = [TorchDDP, TorchFullyShard]


def data_config(ranks: int, microbatches: int, **changes: Any) -> TrainConfig:
    """`microbatches` are those of one replica."""
    return config_of(1, ranks * microbatches, **{"grid": {"data": ranks}} | changes)


@pytest.mark.parametrize("framework", DATA_PARALLEL)
@pytest.mark.parametrize(
    ("ranks", "microbatches", "precision"), [(2, 3, "float64"), (4, 2, "float64"), (2, 1, "float32")]
)
def test_torch_data_parallelism_trains_like_one_rank(
    pool: RankPool, framework: type[TorchDDP], ranks: int, microbatches: int, precision: str
) -> None:
    check(pool, framework, data_config(ranks, microbatches, precision=precision), ChunkLayout(stages=1))


def collectives(comm: MPI.Intracomm, framework: type[TorchDDP], config: TrainConfig) -> Counter[str]:
    """A job of the rank pool: how often each of Gloo's collectives ran for a batch."""
    with (
        connect(ProcessGrid(data=comm.Get_size()), comm=comm) as runtime,
        framework().trainer(config, runtime, None) as trainer,
    ):
        # In the second one DDP orders its buckets anew.
        for step in range(2):
            trainer.train_batch(step)
        with profile() as profiled:
            trainer.train_batch(2)
        return Counter({e.key: e.count for e in profiled.key_averages() if e.key.startswith("gloo:")})


@pytest.mark.parametrize("framework", DATA_PARALLEL)
def test_torch_communicates_once_per_batch(pool: RankPool, framework: type[TorchDDP]) -> None:
    """Of the microbatches but the last reduces gradients, and parameters are gathered but once."""
    one, three = (pool.run(collectives, framework, data_config(2, n), ranks=2) for n in (1, 3))
    assert one == three
    layers = data_config(2, 1).model.layers
    # Of each transformer layer, the embedding and the head; and the loss.
    expected = 2 if framework is TorchDDP else 2 * (layers + 2) + 1
    assert [counted.total() for counted in one] == [expected] * 2


@pytest.mark.parametrize("framework", DATA_PARALLEL)
def test_what_torch_data_parallelism_cannot_do_is_said(framework: type[TorchDDP]) -> None:
    def reason(**changes: Any) -> str:
        return framework().unavailable(data_config(2, 3, **changes)) or ""

    for grid in ({}, {"data": 2, "inter": 2}, {"data": 2, "col": 2}, {"row": 2}):
        assert "G_data" in reason(grid=grid)
    assert "untie" in reason(model=model_of(4, 260) | {"tied_head": True})
    assert "no multiple of G_data x microbatch_size = 8" in reason(grid={"data": 4})
    assert "clip_norm" in reason(optimizer={"clip_norm": 1.0})
    assert not reason()
