"""How PyTorch is launched on a cluster, one of its kinds of parallelism at a time, and how what it left is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from axonn.config.train_config import TrainConfig, validate
from axonn.errors import LaunchError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.perf.strategy import Strategy
from axonn.training.framework import ClusterWork, Launch
from axonn.training.supervision.supervisor import supervise
from baselines.adapters.pytorch.pytorch_adapter import PyTorchAdapter

MODEL = GPTConfig(name="small", layers=8, hidden=64, heads=4, seq_len=16, vocab=512)
ZBV = {"name": "zero-bubble", "chunks": 2, "placement": "v"}


def work(
    grid: dict[str, int], *, clipping: float | None = None, model: GPTConfig = MODEL, **changes: Any
) -> ClusterWork:
    fields = {"grid": grid, "microbatch_size": 2, "compute": "float32", "recompute": "none"} | changes
    return ClusterWork(
        name="small-4",
        model=model,
        strategy=validate(fields, Strategy, where="test"),
        batch_size=32,
        steps=3,
        gpus=4,
        gpus_per_node=4,
        gradient_clipping=clipping,
    )


def spec_of(launch: Launch) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(launch.files["spec.json"])
    return spec


@pytest.mark.parametrize(
    ("grid", "changes", "strategy"),
    [
        ({"data": 4}, {}, "ddp"),
        ({"data": 4}, {"optimizer": "sharded"}, "fully-shard"),
        ({"inter": 4}, {"schedule": {"name": "1f1b"}}, "1f1b"),
        ({"inter": 4}, {"schedule": {"name": "gpipe"}}, "gpipe"),
        ({"inter": 4}, {"schedule": {"name": "interleaved-1f1b", "chunks": 2}}, "interleaved-1f1b"),
        ({"inter": 4}, {"schedule": ZBV}, "zbv"),
        ({"col": 4}, {}, "tensor"),
        ({}, {}, "loop"),
    ],
)
def test_each_kind_of_parallelism_is_launched(grid: dict[str, int], changes: dict[str, Any], strategy: str) -> None:
    launch = PyTorchAdapter().launch(work(grid, **changes))
    spec = spec_of(launch)
    config = validate(spec["config"], TrainConfig, where="spec.json")
    assert spec["framework"] == f"pytorch/{strategy}"
    assert spec["ranks"] == max(grid.values(), default=1)
    assert {axis: extent for axis, extent in config.grid.extents().items() if extent > 1} == grid
    assert (config.batch_size, config.microbatch_size, config.steps) == (32, 2, 3)
    assert config.precision.compute == "float32"
    assert list(launch.command) == ["python", "-m", "axonn.training.worker", "."]
    assert spec["device"] == "cuda"
    assert not launch.mpi_on_device


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (work({"data": 2, "inter": 2}), "along data and inter"),
        (work({"row": 2}), "set the other axes to 1"),
        (work({"inter": 4}), "no schedule 'message-driven'"),
        (work({"inter": 4}, schedule={"name": "interleaved-1f1b", "chunks": 4}), "of 4 chunks"),
        (work({"inter": 4}, schedule=ZBV, optimizer="sharded"), "set optimizer: device"),
        (work({"data": 4}, optimizer="offloaded"), "set optimizer: device"),
        (work({"data": 4}, compute="float16"), "float16"),
        (work({"data": 4}, recompute="full"), "activation_checkpointing"),
        (work({"data": 4}, recompute="selective"), "selective"),
        (work({"data": 4}, clipping=1.0), "optimizer.clip_norm"),
        (work({"data": 32}), "no multiple"),
        (work({"col": 4}, model=MODEL.model_copy(update={"tied_head": True})), "untie"),
    ],
)
def test_what_it_cannot_do_is_refused_and_why(asked: ClusterWork, what: str) -> None:
    with pytest.raises(LaunchError, match=what):
        PyTorchAdapter().launch(asked)


def test_a_launched_run_is_read_whole_and_cut_short(tmp_path: Path) -> None:
    """Of a run that was really made: of two ranks, on this machine."""
    spec = spec_of(PyTorchAdapter().launch(work({"data": 2})))
    config = validate(spec["config"], TrainConfig, where="spec.json")
    outcome = supervise(spec["framework"], config, tmp_path)
    assert outcome.failure is None
    batches = (tmp_path / "batches.jsonl").read_text().splitlines()
    ranks = [line for rank in range(2) for line in (tmp_path / f"rank-{rank}.json").read_text().splitlines()]
    found = PyTorchAdapter().read([*batches, *ranks])
    assert found.losses == outcome.losses
    assert len(found.losses) == 3
    assert found.seconds == outcome.batch_times_s
    assert found.memory_bytes == outcome.memory_bytes
    assert found.finished
    cut = PyTorchAdapter().read([*batches[:1], batches[1][:20], *ranks[:1]])
    assert cut.losses == outcome.losses[:1]
