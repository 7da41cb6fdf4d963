"""Part grids: pipelines and tensor grids of 2 to 4 ranks that share the device train as one rank does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from baselines.gpu.bench_context import Context, NotMeasured
from baselines.gpu.bench_rows import BenchRow, failed
from baselines.gpu.parts.parts_common import agreement, steady

PART = "grids"
GRIDS: tuple[dict[str, int], ...] = (
    {"inter": 2},
    {"col": 2},
    {"row": 2},
    {"data": 2},
    {"inter": 4},
    {"row": 2, "col": 2},
    {"inter": 2, "col": 2},
)
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-3}
"""Largest relative difference from the losses of one rank. In float32 only the order of sums differs; TF32 is off."""
MOST_S = 60.0
LEAST_CORES = 4
"""Cores for each of the runs that are under way at once."""


def name_of(grid: dict[str, int]) -> str:
    return " x ".join(f"{axis} {extent}" for axis, extent in grid.items())


def measure(context: Context) -> tuple[list[BenchRow], dict[str, Any]]:
    """Measure float32 on all grids and bfloat16 on the first two, each compared with one rank."""
    rows: list[BenchRow] = []
    for precision, grids in (("float32", GRIDS), ("bfloat16", GRIDS[:2])):
        rows += compared(context, precision, grids)
    about = {"batches": context.plan.grid_batches, "tolerances": TOLERANCES}
    return rows, about


def compared(context: Context, precision: str, grids: tuple[dict[str, int], ...]) -> list[BenchRow]:
    """Measure one rank, and compare the grids with it."""
    plan = context.plan
    model = f"{plan.small.model.name}, {precision}"

    def config(grid: dict[str, int]) -> Any:
        return plan.small.config(
            steps=plan.grid_batches,
            precision=precision,
            grid=grid,
            batch_size=plan.small.batch_size,
        )

    def row(grid: dict[str, int], label: str, reference: list[float] | None) -> BenchRow:
        try:
            outcome = context.ranks("axonn", config(grid), name=f"{precision} {label}", most_s=MOST_S)
        except NotMeasured as lost:
            return failed(PART, model, label, lost.failure, ours=True, config=config(grid).model_dump(mode="json"))
        times = steady(outcome.batch_times_s, plan.warmup)
        fields = (
            {"losses": outcome.losses}
            if reference is None
            else agreement(outcome.losses, reference, tolerance=TOLERANCES[precision])
        )
        # Ranks that share one device say nothing about speed: times are kept, shares of the peak are not.
        return BenchRow(
            part=PART,
            model=model,
            contender=label,
            ours=True,
            seconds=sum(times) / len(times),
            batch_times_s=outcome.batch_times_s,
            config=config(grid).model_dump(mode="json"),
            **fields,
        )

    serial = row({}, "one rank", None)
    # Nothing is timed here, so several runs may be under way at once where there are cores for them.
    with ThreadPoolExecutor(max(1, context.host_threads // LEAST_CORES)) as pool:
        return [serial, *pool.map(lambda grid: row(grid, name_of(grid), serial.losses), grids)]
