"""Other frameworks behind the one interface train as a plain loop over the whole batch does, on every rank."""

from __future__ import annotations

import tomllib
from collections import Counter
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch.profiler import profile

from axonn.collectives import Call
from axonn.config import TrainConfig, validate
from axonn.errors import LaunchError
from axonn.grid import ProcessGrid
from axonn.initial import fill
from axonn.inter_layer.stage import virtual_spans
from axonn.models.gpt import GPT
from axonn.runtime import connect
from axonn.schedules import ChunkLayout
from axonn.tensor import TensorContext
from baselines.common import Batches
from baselines.deepspeed_pipeline import DeepSpeedPipeline
from baselines.plain_loop import PlainLoop
from baselines.torch_pipelining import TorchPipelining, TorchPipeliningZBV
from baselines.torch_tensor_parallel import (
    CountedCollectives,
    TorchTensorParallel,
    TorchTensorParallelTrainer,
    TorchTensorParallelWholeEmbedding,
)
from experiments.framework import Framework
from tests.rank_pool import ROOT, RankPool

STEPS = 4
HEADS, VOCAB = 3, 257
BOUND = {"float64": 1e-10, "float32": 1e-5}
V = ChunkLayout(stages=2, chunks=2, placement="v")


def model_of(heads: int, vocab: int) -> dict[str, Any]:
    return {"name": "test", "layers": 5, "hidden": 24, "heads": heads, "seq_len": 10, "vocab": vocab}


def config_of(ranks: int, microbatches: int = 6, **changes: Any) -> TrainConfig:
    """Nothing in it is a default, so an option that gets lost shows."""
    plain = {
        "model": model_of(HEADS, VOCAB),
        "grid": {"inter": ranks},
        "batch_size": 2 * microbatches,
        "microbatch_size": 2,
        "optimizer": {"lr": 3e-3, "betas": [0.85, 0.98], "eps": 1e-6, "weight_decay": 0.1},
        "precision": "float64",
        "seed": 5,
    }
    return validate(plain | changes, TrainConfig, where="test")


@cache
def serial_losses(batch_size: int, dtype: str, heads: int = HEADS, vocab: int = VOCAB) -> list[float]:
    """A loop over whole batches: no microbatches, no stages, no fused optimizer."""
    config = config_of(1, batch_size // 2, precision=dtype, model=model_of(heads, vocab))
    model, batches, o = GPT(config.model), Batches(config), config.optimizer
    modules = {layer.name: layer.build(TensorContext.serial()).to(getattr(torch, dtype)) for layer in model.layers}
    named = {f"{n}.{p}": value for n, m in modules.items() for p, value in m.named_parameters()}
    for name, parameter in named.items():
        fill(parameter, model.initial(name), name=name, seed=config.seed)
    optimizer = torch.optim.AdamW(named.values(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    losses = []
    for step in range(STEPS):
        x, targets = batches(step)
        for module in modules.values():
            x = module(x)
        loss = model.loss(x, targets, TensorContext.serial())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(comm: MPI.Intracomm, framework: type[Framework], config: TrainConfig) -> tuple[list[float], list[str]]:
    """A job of the rank pool: losses and the names of the layers here. Sets up twice: nothing may be left over."""
    results = []
    with connect(ProcessGrid(**config.grid.model_dump()), comm=comm) as runtime:
        for _ in range(2):
            with framework().trainer(config, runtime, None) as trainer:
                layers: Any = trainer
                results.append(([trainer.train_batch(step) for step in range(STEPS)], list(layers.layers())))
    assert results[0] == results[1]
    return results[0]


def check(pool: RankPool, framework: type[Framework], config: TrainConfig, layout: ChunkLayout) -> None:
    assert framework().unavailable(config) is None
    dtype = config.precision.compute
    serial = serial_losses(config.batch_size, dtype, config.model.heads, config.model.vocab)
    assert len(set(serial)) == STEPS
    model = GPT(config.model)
    spans = virtual_spans(model, layout)
    ranks = layout.stages * config.grid.col
    for rank, (losses, names) in enumerate(pool.run(train, framework, config, ranks=ranks)):
        assert losses == pytest.approx(serial, rel=BOUND[dtype], abs=0), rank
        mine = [spans[layout.virtual(rank // config.grid.col, chunk)] for chunk in range(layout.chunks)]
        assert names == [model.layers[i].name for span in mine for i in span], rank


def test_plain_loop_trains_like_whole_batches(pool: RankPool) -> None:
    check(pool, PlainLoop, config_of(1), ChunkLayout(stages=1))


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 6), (2, 2), (4, 7)])
def test_torch_1f1b_trains_like_one_rank(pool: RankPool, ranks: int, microbatches: int) -> None:
    check(pool, TorchPipelining, config_of(ranks, microbatches), ChunkLayout(stages=ranks))


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 6), (2, 1), (4, 7)])
def test_torch_zbv_trains_like_one_rank(pool: RankPool, ranks: int, microbatches: int) -> None:
    layout = ChunkLayout(stages=ranks, chunks=2, placement="v")
    check(pool, TorchPipeliningZBV, config_of(ranks, microbatches), layout)


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


def test_deepspeed_trains_like_one_rank(pool: RankPool) -> None:
    pytest.importorskip("deepspeed")
    check(pool, DeepSpeedPipeline, config_of(2, precision="float32"), ChunkLayout(stages=2))


def test_the_reference_sees_a_lost_option() -> None:
    """Equal losses mean something: another seed, optimizer or batch gives others."""
    serial = serial_losses(12, "float64")
    assert serial_losses(14, "float64") != pytest.approx(serial, rel=1e-6)
    assert serial_losses(12, "float32") == pytest.approx(serial, rel=1e-5)


@pytest.mark.parametrize("framework", [PlainLoop, TorchPipelining, TorchPipeliningZBV])
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
    for framework in (TorchPipelining(), TorchPipeliningZBV()):
        assert "G_inter" in reason(framework, grid={"inter": 2, "data": 2})
        assert "tie" in reason(framework, model=tied)
    assert "microbatches" in reason(TorchPipelining(), ranks=4, microbatches=3)
    assert "lower G_inter" in reason(TorchPipeliningZBV(), ranks=7, microbatches=8)
    assert V.virtual_stages == 4


def test_deepspeed_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        from importlib.metadata import PackageNotFoundError

        raise PackageNotFoundError(name)

    monkeypatch.setattr("baselines.deepspeed_pipeline.find_spec", lambda name: None)
    monkeypatch.setattr("baselines.deepspeed_pipeline.version", missing)
    assert "axonn-reproduction[deepspeed]" in (DeepSpeedPipeline().unavailable(config_of(2)) or "")
    with pytest.raises(LaunchError, match=r"axonn-reproduction\[deepspeed\]"):
        DeepSpeedPipeline().version()


def test_every_framework_of_the_project_can_be_made() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = set()
    for target in project["entry-points"]["axonn.frameworks"].values():
        module, _, name = target.partition(":")
        labels.add(getattr(import_module(module), name)().label)
    assert labels >= {"PyTorch 1F1B", "PyTorch ZBV", "PyTorch loop", "DeepSpeed pipeline", "PyTorch tensor parallel"}
    assert len(labels) == len(project["entry-points"]["axonn.frameworks"])
