"""Other frameworks behind the one interface train as a plain loop over the whole batch does, on every rank."""

from __future__ import annotations

import tomllib
from collections import Counter
from importlib import import_module
from typing import Any

import pytest
from mpi4py import MPI
from torch.profiler import profile

from axonn.config.train_config import TrainConfig
from axonn.distributed.collectives import Call
from axonn.distributed.runtime import connect
from axonn.grid import ProcessGrid
from axonn.schedules import ChunkLayout
from axonn.training.framework import Framework
from baselines.adapters.pytorch.pytorch_loop import PlainLoop
from baselines.adapters.pytorch.pytorch_pipelining import (
    TorchPipelining,
    TorchPipeliningGPipe,
    TorchPipeliningInterleaved,
    TorchPipeliningZBV,
)
from baselines.adapters.pytorch.pytorch_tensor import (
    CountedCollectives,
    TorchTensorParallel,
    TorchTensorParallelTrainer,
    TorchTensorParallelWholeEmbedding,
)
from tests.helpers.equal_work import check, config_of, model_of, serial_losses
from tests.helpers.rank_pool import ROOT, RankPool

PIPELINING = [TorchPipelining, TorchPipeliningGPipe, TorchPipeliningInterleaved, TorchPipeliningZBV]
V = ChunkLayout(stages=2, chunks=2, placement="v")


def test_plain_loop_trains_like_whole_batches(pool: RankPool) -> None:
    check(pool, PlainLoop, config_of(1), ChunkLayout(stages=1))


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 6), (2, 2), (4, 7)])
def test_torch_1f1b_trains_like_one_rank(pool: RankPool, ranks: int, microbatches: int) -> None:
    check(pool, TorchPipelining, config_of(ranks, microbatches), ChunkLayout(stages=ranks))


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 6), (2, 1), (4, 7)])
def test_torch_zbv_trains_like_one_rank(pool: RankPool, ranks: int, microbatches: int) -> None:
    layout = ChunkLayout(stages=ranks, chunks=2, placement="v")
    check(pool, TorchPipeliningZBV, config_of(ranks, microbatches), layout)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 6), (2, 1), (4, 3)])
def test_torch_gpipe_trains_like_one_rank(pool: RankPool, ranks: int, microbatches: int) -> None:
    check(pool, TorchPipeliningGPipe, config_of(ranks, microbatches), ChunkLayout(stages=ranks))


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 6), (2, 1), (4, 8)])
def test_torch_interleaved_1f1b_trains_like_one_rank(pool: RankPool, ranks: int, microbatches: int) -> None:
    check(pool, TorchPipeliningInterleaved, config_of(ranks, microbatches), ChunkLayout(stages=ranks, chunks=2))


TENSOR_PARALLEL = [TorchTensorParallel, TorchTensorParallelWholeEmbedding]


def tensor_config(ranks: int, **changes: Any) -> TrainConfig:
    """Heads and vocabulary that 4 ranks can share."""
    return config_of(1, **{"grid": {"col": ranks}, "model": model_of(4, 260)} | changes)


@pytest.mark.parametrize("framework", TENSOR_PARALLEL)
@pytest.mark.parametrize("ranks", [2, 4])
def test_torch_tensor_parallelism_trains_like_one_rank(pool: RankPool, framework: type[Framework], ranks: int) -> None:
    check(pool, framework, tensor_config(ranks), ChunkLayout(stages=1))


def counted(comm: MPI.Intracomm, config: TrainConfig, cut_embedding: bool) -> tuple[int, Counter[Call]]:
    """A job of the rank pool: the collectives that Gloo ran of a batch, and those that were counted."""
    with connect(ProcessGrid(col=comm.Get_size()), comm=comm):
        trainer = TorchTensorParallelTrainer(config, comm.Get_size(), cut_embedding=cut_embedding)
        with CountedCollectives(range(comm.Get_size())) as collectives, profile() as profiled:
            trainer.train_batch(0)
        ran = sum(event.count for event in profiled.key_averages() if event.key.startswith("gloo:"))
        return ran, collectives.calls


@pytest.mark.parametrize("cut_embedding", [True, False])
def test_the_collectives_of_torch_tensor_parallelism_are_all_counted(pool: RankPool, cut_embedding: bool) -> None:
    """In forward projection, FC2 and the embedding where it is cut; in backward QKV, FC1 and the head; the loss."""
    config = tensor_config(2)
    microbatches, rows = 6, 2 * config.model.seq_len
    activation = Call("all-reduce sum", ("col",), (0, 1), rows * config.model.hidden, "float64", 8)
    for ran, calls in pool.run(counted, config, cut_embedding, ranks=2):
        assert calls[activation] == microbatches * (4 * config.model.layers + 1 + cut_embedding)
        of_loss = [call for call in calls if call != activation]
        assert {(call.kind, call.elements) for call in of_loss} >= {("all-reduce max", rows), ("all-reduce sum", rows)}
        assert ran == calls.total()


def test_the_reference_sees_a_lost_option() -> None:
    """Equal losses mean something: another seed, optimizer or batch gives others."""
    serial = serial_losses(12, "float64")
    assert serial_losses(14, "float64") != pytest.approx(serial, rel=1e-6)
    assert serial_losses(12, "float32") == pytest.approx(serial, rel=1e-5)


@pytest.mark.parametrize("framework", [PlainLoop, *PIPELINING])
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"clip_norm": 1.0}},
        {"optimizer": {"schedule": {"name": "cosine", "warmup": 2}}},
        {"precision": "bfloat16"},
        {"activation_checkpointing": 2},
        {"initial_weights": "weights.safetensors"},
    ],
)
def test_what_a_baseline_does_not_do_is_said(framework: type[Framework], changes: dict[str, Any]) -> None:
    ranks = 1 if framework is PlainLoop else 2
    reason = framework().unavailable(config_of(ranks, **changes))
    assert reason is not None
    assert next(iter(changes)) in reason


def test_grids_and_models_that_do_not_fit_are_refused() -> None:
    def reason(framework: Framework, ranks: int = 2, **changes: Any) -> str:
        found = framework.unavailable(config_of(ranks, **changes))
        assert found is not None
        return found

    for framework in TENSOR_PARALLEL:
        for grid in ({"inter": 2}, {"col": 2, "data": 2}, {"row": 2}, {}):
            assert "set the other axes to 1" in reason(framework(), grid=grid)
        assert r"heads (3) of attention" in reason(framework(), grid={"col": 2})
        assert "untie" in reason(framework(), grid={"col": 2}, model=model_of(4, 260) | {"tied_head": True})
        assert "clip_norm" in (framework().unavailable(tensor_config(2, optimizer={"clip_norm": 1.0})) or "")
        assert framework().unavailable(tensor_config(2)) is None
    tied = config_of(2).model.model_dump() | {"tied_head": True}
    assert "1 rank" in reason(PlainLoop())
    for kind in PIPELINING:
        assert "G_inter" in reason(kind(), grid={"inter": 2, "data": 2})
        assert "tie" in reason(kind(), model=tied)
    assert "microbatches" in reason(TorchPipelining(), ranks=4, microbatches=3)
    for kind in (TorchPipeliningZBV, TorchPipeliningInterleaved):
        assert "lower G_inter" in reason(kind(), ranks=7, microbatches=14)
    assert "multiple of G_inter = 2" in reason(TorchPipeliningInterleaved(), microbatches=7)
    assert TorchPipeliningGPipe().unavailable(config_of(4, 3)) is None
    assert V.virtual_stages == 4


def test_every_framework_of_the_project_can_be_made() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = []
    for name, target in project["entry-points"]["axonn.frameworks"].items():
        module, _, kind = target.partition(":")
        adapter = getattr(import_module(module), kind)()
        assert adapter.name == name
        labels += [adapter.framework(strategy or None).label for strategy in adapter.capabilities().strategies]
    assert {"AxoNN", "PyTorch 1F1B", "PyTorch ZBV", "PyTorch loop", "PyTorch tensor parallel"} <= set(labels)
    assert len(set(labels)) == len(labels)
