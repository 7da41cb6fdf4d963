"""make bench: our engine beside PyTorch's own, and the simulator. Ratios are medians of paired, alternating runs."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from axonn.perf.predict import simulate_pipeline, stage_times
from experiments.definition import ROOT, find_machine, load_experiment, load_model, strategy_of
from tests.bench.workloads import run_paired

ROUNDS = {"small": 20, "wide": 8}


@pytest.mark.parametrize("workload", ["small", "wide"])
@pytest.mark.parametrize(("baseline", "ranks", "target"), [("pytorch-loop", 1, 1.03), ("torch-pipelining", 2, 1.00)])
def bench_engine(benchmark: BenchmarkFixture, workload: str, baseline: str, ranks: int, target: float) -> None:
    paired = benchmark.pedantic(
        run_paired,
        args=(workload, [("axonn", {}), (baseline, {})]),
        kwargs={"ranks": ranks, "rounds": ROUNDS[workload]},
        rounds=1,
    )
    # Losses before times: only equal work may be compared.
    assert paired.loss_difference < 1e-4
    benchmark.extra_info.update(
        what=f"batch, {workload}, {ranks} rank(s), over {baseline}", ratio=paired.ratio(over=1), target=target
    )


def bench_simulation_of_100b(benchmark: BenchmarkFixture) -> None:
    panel = load_experiment(ROOT / "experiments" / "fig6.yaml").predicted
    (point,) = [p for p in panel.points if (p.framework, p.model) == ("AxoNN", "gpt-100b")]
    strategy = strategy_of(panel, point, where="experiments/fig6.yaml")
    model, machine = load_model(point.model), find_machine(panel.machine)
    stages = stage_times(model, machine, strategy)
    microbatches = strategy.microbatches(panel.batch_size)
    assert (len(stages), microbatches) == (48, 1024)
    benchmark(simulate_pipeline, model, machine, strategy, microbatches=microbatches, stages=stages)
    benchmark.extra_info.update(what="simulation, 48 stages x 1024 microbatches (s)", target=2.0)
