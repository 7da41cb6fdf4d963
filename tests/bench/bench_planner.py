"""Part of make bench: how fast configurations are estimated, and how long a large plan takes."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from axonn.perf.planner.planner import StrategyPlan, plan
from axonn.perf.planner.search_space import Space
from experiments.definition import find_machine, load_model
from experiments.planning.planning import plannable


def bench_plan_for_4096_gpus(benchmark: BenchmarkFixture) -> None:
    def run() -> StrategyPlan:
        space = Space(gpus=4096, batch_size=16384)
        return plan(plannable(load_model("gpt-100b")), find_machine("summit"), space)

    found = benchmark.pedantic(run, rounds=1)
    rate = found.estimated / found.estimating_s
    benchmark.extra_info.update(what="plan of GPT 100B on 4,096 GPUs (s)", target=60.0)
    benchmark.extra_info.update(estimated=found.estimated, estimated_per_s=round(rate), estimated_per_s_target=5000)
    print(f"\n{found.estimated} configurations, {rate:.0f} per second in closed form (target: at least 5000)")
