"""How our own ranks are launched on a cluster, and what is read of the files and the output that they leave.

`python -m tests.training.test_launched` writes the goldens of our engine and of the reference implementation anew.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from axonn.config.train_config import TrainConfig, validate
from axonn.errors import LaunchError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.unet.unet_config import UNetConfig
from axonn.perf.strategy import Strategy
from axonn.training.engine_framework import EngineAdapter
from axonn.training.framework import ClusterWork
from axonn.training.supervision.cluster_launch import data_of, read_run
from axonn.training.supervision.supervisor import supervise
from experiments.definition import ROOT
from tests.helpers.command_line import tiny
from tests.helpers.launches import check_goldens, files_of, published, run_launch, write_goldens

ADAPTERS = ("axonn", "reference")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_published_configurations_are_launched_as_ever(adapter: str) -> None:
    assert check_goldens(adapter, "AxoNN") == 19


def work(*, data: str | None = None, clipping: float | None = None, vocab: int = 256, **strategy: Any) -> ClusterWork:
    fields = {"grid": {"inter": 2}, "microbatch_size": 2, "compute": "float32", "message_library": "mpi"} | strategy
    return ClusterWork(
        name="tiny-2",
        model=GPTConfig(name="tiny", layers=2, hidden=16, heads=2, seq_len=16, vocab=vocab),
        strategy=validate(fields, Strategy, where="test"),
        batch_size=8,
        steps=3,
        gpus=2,
        gpus_per_node=2,
        gradient_clipping=clipping,
        data=data,
    )


def config_of(asked: ClusterWork) -> TrainConfig:
    """What the ranks of our engine would train."""
    spec = json.loads(EngineAdapter().launch(asked).files["spec.json"])
    assert spec["ranks"] == 2
    return validate(spec["config"], TrainConfig, where="spec.json")


def test_the_engine_trains_what_is_asked_for() -> None:
    for point in published("AxoNN"):
        config = config_of_spec(EngineAdapter().launch(point).files["spec.json"])
        assert (config.model, config.grid, config.steps) == (point.model, point.strategy.grid, 11)
        assert config.schedule == point.strategy.schedule
        assert config.optimizer.placement == point.strategy.optimizer
    config = config_of(work(clipping=0.5, clip_norm=True, recompute="none", optimizer="device"))
    assert config.optimizer.clip_norm == 0.5
    assert config.activation_checkpointing is None
    assert config.optimizer.placement == "device"
    assert config.data.path is None
    assert config_of(work(data="corpus/text_document")).data.path == "corpus/text_document.bin"


@pytest.mark.parametrize("data", [None, "corpus/text_document"])
def test_a_unet_is_given_images(data: str | None) -> None:
    model = UNetConfig(
        name="tiny", image_size=8, channels=1, width=8, multipliers=(1,), blocks=1, head_channels=8, groups=8
    )
    found, notes = data_of(dataclasses.replace(work(data=data), model=model))
    assert found.path is None
    assert notes == ["the images are scikit-learn's digits"]


def config_of_spec(text: str) -> TrainConfig:
    return validate(json.loads(text)["config"], TrainConfig, where="spec.json")


def test_what_the_engine_does_otherwise_is_said() -> None:
    (said,) = [note for note in EngineAdapter().launch(work()).notes if note.startswith("of the strategy")]
    assert "partition 'layers' (the engine: 'work')" in said
    assert "partition_messages" not in said, "nothing is cut"
    assert "order" not in said
    (said,) = [
        note
        for note in EngineAdapter().launch(work(order=("inter", "row", "col", "data"), grid={"data": 2})).notes
        if note.startswith("of the strategy")
    ]
    assert "order" not in said, "of one axis there is one order"


def test_what_the_engine_does_not_do_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"tiny-2 cannot be launched with AxoNN: .*optimizer 'sharded'"):
        EngineAdapter().launch(work(optimizer="sharded"))
    with pytest.raises(LaunchError, match="no multiple of G_data x microbatch_size"):
        EngineAdapter().launch(work(microbatch_size=3))
    with pytest.raises(LaunchError, match="70000 tokens, and files of tokens hold 65536"):
        EngineAdapter().launch(work(data="corpus", vocab=70_000))


def test_a_launch_runs_as_it_says(tmp_path: Path) -> None:
    """Its command with its files, where it is started."""
    launch = EngineAdapter().launch(work(partition="work"))
    run = EngineAdapter().read(run_launch(launch, 2, tmp_path, python=sys.executable, path=str(ROOT)))
    assert run.failure is None
    assert run.finished
    assert len(run.losses) == 3


def test_a_run_is_read_as_it_was(tmp_path: Path) -> None:
    asked = tiny(inter=2, steps=3)
    outcome = supervise("axonn", asked, tmp_path, timeout_s=120)
    assert outcome.failure is None
    run = read_run(files_of(tmp_path))
    assert run.finished
    assert run.failure is None
    assert list(run.losses) == outcome.losses
    assert list(run.seconds) == outcome.batch_times_s
    assert len(run.seconds) == 3
    assert run.memory_bytes == outcome.memory_bytes


def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    """The rank's own words, from its state or from its traceback."""
    missing = tmp_path / "nothing.bin"
    supervise("axonn", tiny(inter=2, steps=3, data={"path": str(missing)}), tmp_path / "run", timeout_s=120)
    for lines in (files_of(tmp_path / "run"), (tmp_path / "run" / "log.txt").read_text().splitlines()):
        run = read_run(lines)
        assert not run.finished
        assert run.seconds == []
        assert run.failure is not None
        assert run.failure.cause == "error"
        assert str(missing) in run.failure.detail


def batch(step: int, loss: float = 2.0) -> str:
    return json.dumps({"step": step, "loss": loss, "seconds": 0.5 + step})


def state(name: str, time: float, **details: Any) -> str:
    return json.dumps({"state": name, "pid": 1, "time": time, **details})


def test_lines_may_be_labelled_mixed_doubled_and_cut() -> None:
    lines = [
        "[1,0]<stdout>:" + batch(1),
        "0: " + batch(0) + "\n",
        "a line { of something else",
        '{"step": 7}',
        batch(1),
        state("done", 9.0, memory_bytes=5),
        "3: " + state("done", 8.0, memory_bytes=7),
        batch(2)[:-9],
    ]
    run = read_run(lines)
    assert run.seconds == [0.5, 1.5]
    assert run.finished
    assert run.memory_bytes == 7
    assert read_run([]) == read_run(["nothing of it"])
    assert not read_run([batch(0)]).finished, "no rank has said that it is done"


def test_a_run_that_was_cut_short_is_not_finished() -> None:
    run = read_run([batch(0), state("started", 1.0), state("done", 2.0, memory_bytes=3)])
    assert not run.finished
    assert run.failure is None
    assert run.losses == [2.0]


def test_the_cause_is_preferred_to_what_came_of_it() -> None:
    broken = state("failed", 1.0, cause="error", detail="RuntimeError: Connection closed by peer [10.0.0.1]:3215")
    killed = "srun: error: node7: task 3: Out Of Memory"
    run = read_run([broken, state("started", 0.5), killed])
    assert run.failure is not None
    assert (run.failure.cause, run.failure.rank) == ("out-of-memory", 3)
    nan = state("failed", 3.0, cause="nan", detail="FloatingPointError: the loss of batch 4 is nan; lower optimizer.lr")
    run = read_run([broken, nan, batch(4, math.nan)])
    assert run.failure is not None
    assert run.failure.cause == "nan"
    assert math.isnan(run.losses[0])


if __name__ == "__main__":
    for name in ADAPTERS:
        write_goldens(name, "AxoNN")
