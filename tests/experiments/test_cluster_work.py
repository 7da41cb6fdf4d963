"""What a run on a cluster printed becomes a record: a time only where all its iterations are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from axonn.observability.records import Failure, Machine, Record, read_records, write_records
from axonn.training.framework import ClusterWork, PrintedRun
from experiments.cluster_work import record_of
from experiments.definition import HERE, load_experiment
from tests.helpers.launches import point_work, published

SECONDS = [90.0, *(10.0 + i for i in range(10))]


def work() -> ClusterWork:
    panel = load_experiment(HERE / "fig6.yaml").predicted
    assert panel is not None
    return point_work(panel, next(point for point in panel.points if point.framework == "DeepSpeed"))


def record(**changes: Any) -> Record:
    run = PrintedRun(**{"seconds": SECONDS, "losses": [9.0] * 11, "memory_bytes": 7, "finished": True} | changes)
    return record_of(
        work(),
        run,
        framework="DeepSpeed",
        version="deepspeed 0.5",
        machine=Machine(name="summit"),
        source="job 17",
        experiment="fig6",
    )


def test_the_first_iteration_warms_up(tmp_path: Path) -> None:
    found = record()
    assert found.batch_time_s == pytest.approx(14.5)
    assert (found.warmup_batches, found.batch_times_s, found.memory_bytes) == (1, SECONDS, 7)
    assert (found.point, found.asked.gpus, found.ran.grid.col) == ("gpt-12b-48", 48, 3)
    assert found.ran.microbatches == 1024
    work_flop = found.asked.flops(recompute=True)
    assert found.tflops_per_gpu == pytest.approx(work_flop / 14.5 / 48 / 1e12)
    write_records(tmp_path / "one.json", [found])
    assert read_records(tmp_path / "one.json") == [found]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seconds": SECONDS[:7], "finished": False}, "7 of 11 iterations, its output stops there"),
        ({"seconds": SECONDS[:7]}, "7 of 11 iterations, it ended by itself"),
        ({"failure": Failure(cause="out-of-memory", detail="rank 3: no memory", rank=3)}, "rank 3: no memory"),
    ],
)
def test_a_run_that_is_not_whole_is_a_failure(changes: dict[str, Any], said: str) -> None:
    found = record(**changes)
    assert found.batch_time_s is None
    assert found.failure is not None
    assert found.failure.detail == said
    assert found.tflops_per_gpu is None


def test_iterations_that_warm_up_alone_are_a_failure() -> None:
    made = record_of(
        work(),
        PrintedRun(seconds=SECONDS, losses=[9.0] * 11, finished=True),
        framework="DeepSpeed",
        version="deepspeed 0.5",
        machine=Machine(name="summit"),
        source="job 17",
        experiment="fig6",
        new_starts=range(1, 11),
    )
    assert made.batch_time_s is None
    assert made.failure is not None
    assert made.failure.detail == "no batch but those that warm up: the first 1 and the first of each new start"


def test_every_published_point_of_a_baseline_can_be_a_record() -> None:
    for framework in ("AxoNN", "DeepSpeed", "Megatron-LM"):
        for point in published(framework):
            run = PrintedRun(seconds=SECONDS, losses=[], finished=True)
            machine = Machine(name="summit")
            made = record_of(
                point, run, framework=framework, version="?", machine=machine, source="job", experiment="x"
            )
            assert made.asked.gpus == point.gpus
