"""Part of make bench: how long the simulator takes."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from axonn.models.registry import outline_of
from axonn.perf.prediction import simulate_pipeline
from axonn.perf.timing.stage_times import stage_times
from experiments.definition import ROOT, find_machine, load_experiment, load_model, strategy_of


def bench_simulation_of_100b(benchmark: BenchmarkFixture) -> None:
    panel = load_experiment(ROOT / "experiments" / "fig6.yaml").predicted
    (point,) = [p for p in panel.points if (p.framework, p.model) == ("AxoNN", "gpt-100b")]
    strategy = strategy_of(panel, point, where="experiments/fig6.yaml")
    outline, machine = outline_of(load_model(point.model)), find_machine(panel.machine)
    stages = stage_times(outline, machine, strategy)
    microbatches = strategy.microbatches(panel.batch_size)
    assert (len(stages), microbatches) == (48, 1024)
    benchmark(simulate_pipeline, outline, machine, strategy, microbatches=microbatches, stages=stages)
    benchmark.extra_info.update(what="simulation, 48 stages x 1024 microbatches (s)", target=1.0)
