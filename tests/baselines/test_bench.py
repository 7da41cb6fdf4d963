"""The benchmarks compare like with like: equal sleeps for everyone, messages on time, results that say their source."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from axonn.config.train_config import TrainConfig, validate
from axonn.distributed.runtime import connect
from axonn.distributed.tensor_spec import TensorSpec
from axonn.distributed.transport import Address, InProcessCollectives, InProcessTransport, InProcessWorld, MessageEdge
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_model import GPT
from axonn.schedules import ChunkLayout, Direction, Kind, ScheduleSpec, Task, make_schedule
from axonn.spans import Overlap, SpanRecorder
from axonn.training.engine_framework import EngineFramework
from axonn.training.framework import Framework
from baselines.adapters.pytorch.pytorch_pipelining import TorchPipelining, TorchPipeliningZBV
from baselines.adapters.pytorch.pytorch_tensor import TorchTensorParallel
from experiments.slow_link import kbit_per_second, message_bytes
from experiments.workloads import MICROBATCHES, SHAPES, config_of
from tests.bench import jitter, sleeping, tensor
from tests.bench.frameworks import Comparison, OneRank
from tests.bench.jitter import Sleeps, draw
from tests.bench.optimizer import bsize_of, parameters_of
from tests.bench.paired import layers_of, on_grid, overlap_of, train_counted
from tests.bench.report import make_console, save, show
from tests.bench.schedules import cases, disagreements
from tests.bench.sleeping import Compute, DelayedTransport, SleepModel
from tests.bench.workloads import (
    OTHERS,
    OURS,
    Contender,
    Jitter,
    Paired,
)
from tests.helpers.rank_pool import RankPool

STEPS = 2
SECONDS = Jitter.of("tiny", 1.0, 2.0)


@given(st.integers(), st.lists(st.integers() | st.text(), max_size=4))
def test_a_draw_is_a_function_of_its_arguments(seed: int, key: list[int | str]) -> None:
    assert 0 <= draw(seed, *key) < 1
    assert draw(seed, *key) == draw(seed, *key)
    assert draw(seed, *key) != draw(seed + 1, *key)
    assert draw(seed, *key) != draw(seed, *key, 0)


# --- jitter: equal for all contenders


def sleeps_of(comm: MPI.Intracomm, framework: type[Framework], options: dict[str, Any]) -> tuple[list[float], Any, Any]:
    """A job of the rank pool: losses, the sleeps of this rank, and the losses without them."""
    plain = config_of("tiny", {"inter": 2}) | options
    config = validate(plain, TrainConfig, where="test")
    slept: list[float] = []
    real, jitter.time = jitter.time, SimpleNamespace(sleep=slept.append)  # type: ignore[assignment]
    try:
        with connect(ProcessGrid(inter=2), comm=comm) as runtime:
            with framework().trainer(config, runtime, None) as trainer:
                quiet = [trainer.train_batch(step) for step in range(STEPS)]
            with framework().trainer(config, runtime, None) as trainer:
                sleeps = Sleeps(**vars(SECONDS)).attach(layers_of(trainer))
                losses = []
                # PyTorch tries its stages out in the first batch.
                for step in range(STEPS):
                    slept.clear()
                    sleeps.begin(step)
                    losses.append(trainer.train_batch(step))
    finally:
        jitter.time = real
    return losses, slept, quiet


@pytest.mark.parametrize(
    ("framework", "options"),
    [
        (EngineFramework, {}),
        (EngineFramework, {"schedule": {"name": "zero-bubble", "chunks": 2, "placement": "v"}}),
        (TorchPipelining, {}),
        (TorchPipeliningZBV, {}),
    ],
    ids=["ours", "ours, zero-bubble V", "1F1B", "ZBV"],
)
def test_every_contender_sleeps_the_same_times(
    pool: RankPool, framework: type[Framework], options: dict[str, Any]
) -> None:
    ranks = pool.run(sleeps_of, framework, options, ranks=2)
    sleeps = Sleeps(**vars(SECONDS))
    expected = [
        seconds
        for name, microbatch in product(SECONDS.after, range(MICROBATCHES))
        for seconds in sleeps.seconds(name, STEPS - 1, microbatch)
    ]
    assert sorted(s for _, slept, _ in ranks for s in slept) == sorted(expected)
    assert all(losses == quiet for losses, _, quiet in ranks)
    # Nobody sleeps more than twice a tenth of what it computes, on average a tenth.
    assert sum(expected) == pytest.approx(0.1 * 2 * 3.0 * MICROBATCHES, rel=0.3)
    assert max(expected) < 0.2 * 2 * 2.0


def test_the_sleeps_of_a_workload_add_up_to_its_compute() -> None:
    for workload in SHAPES:
        after = Jitter.of(workload, 1.5, 4.0).after
        assert len(after) == 4
        assert [sum(way) for way in zip(*after.values(), strict=True)] == pytest.approx([3.0, 8.0])


# --- schedules whose compute sleeps

SLEEPERS = {name: case for name, case in cases(3).items() if "limit 1.25" not in name}


@pytest.mark.parametrize("name", SLEEPERS)
def test_a_sleeping_pipeline_sleeps_each_task_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, microbatches = 3, 6
    spec = ScheduleSpec(**SLEEPERS[name])
    layout = spec.layout(stages)
    compute = Compute(0.25, layout, jitter=0.1)
    slept: list[float] = []
    monkeypatch.setattr(sleeping, "time", SimpleNamespace(sleep=slept.append, perf_counter=time.perf_counter))
    world = InProcessWorld(stages, order_seed=3)

    def body(rank: int) -> float:
        engine = Engine(
            SleepModel(layout, compute),
            grid=ProcessGrid(inter=stages),
            rank=rank,
            batch_size=microbatches,
            microbatch_size=1,
            transport=DelayedTransport(InProcessTransport(world, rank)),
            collectives=InProcessCollectives(world, ProcessGrid(inter=stages), rank),
            schedule=spec,
        )
        numbers = torch.arange(microbatches, dtype=torch.float32).view(-1, 1)
        loss = engine.train_batch(numbers, numbers).loss
        assert engine.held_microbatches == 0
        return loss

    # Each microbatch comes out as the number it went in as.
    assert world.run(body) == [pytest.approx((microbatches - 1) / 2)] * stages
    expected = [
        compute(stage, Task(kind, chunk, m))
        for stage, chunk, m in product(range(stages), range(layout.chunks), range(microbatches))
        for kind in (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT)
    ]
    assert sorted(slept) == sorted(expected)


def test_a_backward_takes_as_long_whole_as_split() -> None:
    compute = Compute(1.0, ChunkLayout(stages=4, chunks=2, placement="v"), jitter=0.1)
    whole, first, second = (compute(2, Task(kind, 1, 5)) for kind in (Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT))
    assert whole == first + second
    assert first != second
    assert all(0.5 <= seconds < 0.6 for seconds in (first, second))


def test_a_message_is_not_handed_over_before_its_time() -> None:
    world = InProcessWorld(2)
    latency = 0.02

    def body(rank: int) -> list[tuple[float, Any]]:
        wire = DelayedTransport(InProcessTransport(world, rank))
        wire.latency = latency
        specs = (TensorSpec((2,), torch.float32),)
        wire.expect(
            MessageEdge(peer=1 - rank, direction=Direction.FORWARD, tensors=specs, device=torch.device("cpu")), 3
        )
        for m in range(3):
            sent = torch.tensor([m, rank], dtype=torch.float32)
            wire.send(1 - rank, Address(Direction.FORWARD, 0, m), (sent,))
        last = time.perf_counter()
        got: list[Any] = []
        while len(got) < 3:
            got += [(time.perf_counter() - last, message) for message in wire.wait()]
        assert wire.poll() == []
        assert len(wire.waited_for) >= 1
        return got

    for rank, got in enumerate(world.run(body)):
        assert [message.address.microbatch for _, message in got] == [0, 1, 2]
        for m, (_, message) in enumerate(got):
            (tensor,) = message.tensors
            assert tensor.tolist() == [m, 1 - rank]
    assert world.run(body)[0][-1][0] >= latency


def test_the_schedules_of_the_benchmark_exist() -> None:
    for name, case in cases(8).items():
        for stage in range(8):
            schedule = make_schedule(ScheduleSpec(**case), stage=stage, stages=8, microbatches=32)
            assert not schedule.done, name
    assert [case["in_flight_limit"] for case in cases(8).values() if "in_flight_limit" in case] == [8, 10, 12, 16]


def test_orders_that_disagree_are_found() -> None:
    def row(schedule: str, simulated: float, measured: float, share: float = 0.5) -> dict[str, Any]:
        return {"message_over_forward": share, "schedule": schedule, "simulated_s": simulated, "measured_s": measured}

    agree = [row("a", 1.0, 1.1), row("b", 1.1, 1.2), row("c", 1.02, 1.0), row("d", 9.0, 0.1, share=0.2)]
    assert disagreements(agree) == []
    (found,) = disagreements([*agree, row("e", 1.3, 1.15)])
    assert (found["faster_in_simulation"], found["slower_in_simulation"]) == ("b", "e")
    assert found["simulated_ratio"] == pytest.approx(1.3 / 1.1)


# --- results


def test_contenders_are_configurations() -> None:
    names = Counter(c.label for c in (*OURS, *OTHERS))
    assert max(names.values()) == 1
    for workload, contender in product(SHAPES, OURS):
        validate(config_of(workload, {"inter": 2}) | dict(contender.options), TrainConfig, where=contender.label)


def test_a_comparison_knows_shares_of_the_bound_and_targets() -> None:
    contenders = (*OURS[:2], *OTHERS)
    paired = Paired([[2.0] * 3, [1.0, 1.25, 5.0], [2.5] * 3, [1.0, 5.0, 1.0]], [[1.0]] * 4, [None] * 4, [[]] * 4)
    one = OneRank([2.4, 2.4, 2.0], [2.0, 2.2, 2.0])
    found = Comparison(contenders, paired, one + one, one)
    assert found.best == contenders[1]
    rows = found.rows(workload="w")
    assert [row["share_of_bound"] for row in rows] == pytest.approx([0.5, 0.8, 0.4, 1.0])
    assert rows[0]["over_1f1b"] == 0.8
    assert [row["over_zbv"] for row in rows] == [2.0, 1.0, 2.5, 1.0]
    assert [row["reached"] for row in found.targets(driven_over_1f1b=0.9)] == [True, False, True]
    assert one.ratio == pytest.approx(2.4 / 2.2)


def test_different_losses_stop_a_comparison() -> None:
    with pytest.raises(SystemExit, match="losses differ"):
        Paired([[1.0], [1.0]], [[2.0], [2.1]], [None] * 2, [[]] * 2).check_losses()
    with pytest.raises(SystemExit, match="losses differ"):
        Paired([[1.0], [1.0]], [[2.0], [float("nan")]], [None] * 2, [[]] * 2).check_losses()


def test_what_is_written_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--quick"])
    rows = [{"contender": "a", "batch_s": 1.25, "reached": True}, {"contender": "b", "note": None}]
    path = save("x", rows, quick=True, folder=tmp_path, settings={"rounds": 2})
    assert path.name == "x-quick.json"
    content = json.loads(path.read_text())
    assert content["kind"] == "measured"
    assert content["rows"] == rows
    assert content["settings"] == {"rounds": 2}
    assert {"command", "created", "machine", "quick"} <= content.keys()
    assert content["command"].endswith(" --quick")
    show("title", rows, make_console())
    printed = capsys.readouterr().out
    assert "batch s" in printed
    assert "1.250" in printed
    assert "yes" in printed


@pytest.mark.parametrize("workload", SHAPES)
def test_the_bucket_of_the_benchmark_leaves_a_saving_of_four(workload: str) -> None:
    phi, bsize = parameters_of(workload), bsize_of(workload)
    assert 20 * phi / (4 * phi + 16 * 2 * bsize) >= 4.0
    assert Contender("x").ours


# --- tensor parallelism


def of_batch(comm: MPI.Intracomm, row: int, col: int) -> tuple[float, float | None, list[list[float]]]:
    """A job of the rank pool: loss, bytes and overlap of a batch of ours, on ranks that were connected as 1 x 2."""
    grid = ProcessGrid(row=row, col=col)
    config = validate(config_of("tiny", grid_of(grid)), TrainConfig, where="test")
    with connect(ProcessGrid(col=2), comm=comm) as runtime:
        spans = SpanRecorder(runtime.rank)
        with EngineFramework().trainer(config, on_grid(runtime, grid), spans) as trainer:
            loss, sent_bytes = train_counted(trainer, 0, 2)
        return loss, sent_bytes, overlap_of(spans, runtime)


def of_pytorch(comm: MPI.Intracomm) -> tuple[float, float | None, list[list[float]]]:
    config = validate(config_of("tiny", {"col": 2}), TrainConfig, where="test")
    with connect(ProcessGrid(col=2), comm=comm) as runtime:
        spans = SpanRecorder(runtime.rank)
        with TorchTensorParallel().trainer(config, runtime, spans) as trainer:
            loss, sent_bytes = train_counted(trainer, 0, 2)
        return loss, sent_bytes, overlap_of(spans, runtime)


def grid_of(grid: ProcessGrid) -> dict[str, int]:
    return {"row": grid.row, "col": grid.col}


def test_contenders_in_the_same_ranks_are_counted_alike(pool: RankPool) -> None:
    wide, tall = (pool.run(of_batch, *extents, ranks=2) for extents in ((1, 2), (2, 1)))
    theirs = pool.run(of_pytorch, ranks=2)
    losses = [loss for rank in (*wide, *tall, *theirs) for loss in rank[:1]]
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-5)
    for rank in range(2):
        assert wide[rank][1] == tensor.sent("tiny", ProcessGrid(col=2))
        assert tall[rank][1] == tensor.sent("tiny", ProcessGrid(row=2))
        # A sum of one double per batch is ours alone; of the logits, both reduce three numbers for each token.
        assert wide[rank][1] - theirs[rank][1] == 8
    for ranks in (wide, tall):
        (first,), (second,) = (Overlap(*o) for o in ranks[0][2]), (Overlap(*o) for o in ranks[1][2])
        assert first == second
        assert first.compute > 0
        assert 0 <= first.hidden <= first.hideable
        assert 0 < first.hideable <= first.collective
    assert theirs[0][2] == [[0, 0, 0, 0]]


@pytest.mark.parametrize("workload", SHAPES)
@pytest.mark.parametrize("ranks", tensor.RANKS)
def test_the_model_chooses_the_grid_that_counts(workload: str, ranks: int) -> None:
    grids = tensor.grids_of(ranks)
    assert all(grid.tensor == grid.size == ranks for grid in grids)
    assert len(grids) == len(set(grids)) == {2: 2, 4: 3}[ranks]
    for grid in grids:
        config = validate(config_of(workload, grid_of(grid)), TrainConfig, where=workload)
        GPT(config.model).check(grid)
    assert tensor.chosen_grid(workload, ranks) == ProcessGrid(col=ranks)
    # Two all-reduces of an activation in forward, two in backward, in each of 8 microbatches.
    of_layer = MICROBATCHES * 4 * message_bytes(workload) * 2 * (ranks - 1)
    assert tensor.layer_bytes(workload, ranks) == pytest.approx(of_layer)


def test_a_link_takes_its_share_of_the_compute() -> None:
    assert kbit_per_second(1e6, 0.5) == 16_000
    assert kbit_per_second(1, 1e9) == 1


def test_a_comparison_of_tensor_parallelism_says_what_counts() -> None:
    def overlaps(hidden: float) -> list[Overlap]:
        return [Overlap(compute=4.0, collective=2.0, hidden=hidden, hideable=share) for share in (1.0, 2.0, 2.0)]

    grid = ProcessGrid(col=2)
    contenders = [tensor.ours(grid, 1), tensor.ours(grid, 2), *tensor.pytorch(2)]
    times = [[2.0, 2.0, 2.0], [1.6, 1.8, 1.6], [2.5, 1.5, 2.0], [3.0, 3.0, 3.0]]
    paired = Paired(
        times, [[1.0]] * 4, [None] * 4, [[]] * 4, [overlaps(0.5), overlaps(1.5), [], []], [3e6, 3e6, 4e6, None]
    )
    found = tensor.Comparison(contenders, paired)
    assert found.fastest_pytorch == 2
    assert found.over_pytorch == pytest.approx(0.8)
    assert found.saved == pytest.approx(0.2)
    rows = found.rows(workload="w")
    assert [row["chosen"] for row in rows] == [True, True, False, False]
    assert [row["sent_mb_per_rank"] for row in rows] == [3.0, 3.0, 4.0, None]
    assert [row.get("hidden") for row in rows] == [0.25, 0.75, None, None]
    assert rows[1]["hidden_of_hideable"] == 0.75
    assert rows[1]["collectives_over_compute"] == 0.5
    assert [row["reached"] for row in (tensor.bounded(found, 0.85), tensor.bounded(found, 0.75))] == [True, False]
    assert [(row["figure"], row["reached"]) for row in tensor.hidden(found)] == [
        (0.75, True),
        (pytest.approx(0.2), True),
    ]
