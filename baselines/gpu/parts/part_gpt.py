"""Part gpt: tokens/s and share of the peak of GPTs, our engine beside plain PyTorch and other frameworks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from axonn.config.train_config import TrainConfig
from axonn.observability.records import Failure
from axonn.training.framework import load_framework, version_of
from baselines.gpu.bench_context import Context, NotMeasured
from baselines.gpu.bench_rows import BenchRow, failed
from baselines.gpu.bench_work import BenchModel
from baselines.gpu.parts.parts_common import agreement, speed, steady
from baselines.gpu.tasks.task_gpt import COMPILED, ENGINE, LOOP
from baselines.statistics import median_interval, paired_ratios

PART = "gpt"
LABELS = {ENGINE: "AxoNN", LOOP: "plain PyTorch loop", COMPILED: "plain loop, torch.compile"}
FOREIGN = ("deepspeed/zero-1", "megatron/tensor")
LEAST_MEMORY_SHARE = 0.9
"""Share of the device's memory that contenders in one process may need in all, by the estimate of `bytes_needed`."""
FOREIGN_SHARE = 0.35
"""Share of the part's time that is reserved for the other frameworks, which run after all else."""
FOREIGN_MOST_S = 75.0
MOST_SHARE = 0.7
"""Share of the remaining time for one process: a compiler that never ends leaves something to the others."""
REMARKS = {
    "megatron": "its local layers without Transformer Engine, float32 masters by PyTorch's fused AdamW",
    "deepspeed": "float32 masters from weights that were rounded to bfloat16",
}


def bytes_needed(work: BenchModel, contenders: int) -> int:
    """Estimate the bytes of `contenders`: 20 for each parameter of each, and activations and logits of one microbatch,
    once."""
    model, rows = work.model, work.microbatch_size
    tokens = rows * model.seq_len
    return contenders * 20 * model.parameters + tokens * (34 * model.hidden * model.layers + 12 * model.vocab)


def groups(work: BenchModel, memory: int | None) -> list[list[str]]:
    """Return the contenders that take turns in one process: all three where memory allows, otherwise our engine with
    each of the others, otherwise each alone."""
    everyone = [ENGINE, LOOP, COMPILED]
    if memory is None or bytes_needed(work, 3) <= LEAST_MEMORY_SHARE * memory:
        return [everyone]
    if bytes_needed(work, 2) <= LEAST_MEMORY_SHARE * memory:
        return [[ENGINE, LOOP], [ENGINE, COMPILED]]
    return [[name] for name in everyone]


def measure(context: Context) -> tuple[list[BenchRow], dict[str, Any]]:
    """Measure every model, the smallest first; then the other frameworks, the smallest model last."""
    memory = None if context.peak is None else context.peak.memory
    about: dict[str, Any] = {
        "formula": "72bslh^2(1+s/6h)+6bshV",
        "peak": None if context.peak is None else context.peak.model_dump(exclude_none=True),
    }
    rows: list[BenchRow] = []
    part_deadline = context.deadline
    if any(context.refusal(name) is None for name in FOREIGN):
        context.deadline = part_deadline - FOREIGN_SHARE * context.left_s
    for work in context.plan.gpts:
        rows += own_rows(context, work, memory)
    context.deadline = part_deadline
    for work in reversed(context.plan.gpts):
        rows += foreign_rows(context, work, rows)
    order = [work.model.name for work in context.plan.gpts]
    return sorted(rows, key=lambda row: order.index(row.model)), about


def own_rows(context: Context, work: BenchModel, memory: int | None) -> list[BenchRow]:
    """Measure our engine, the loop and the compiled loop."""
    plan = context.plan
    steps = plan.warmup + plan.rounds * plan.batches
    config = work.config(steps=steps)
    plain = config.model_dump(mode="json")
    by_contender: dict[str, BenchRow] = {}
    reference: list[float] = []
    waiting = groups(work, memory)
    while waiting:
        group = waiting.pop(0)
        try:
            result = context.task(
                "gpt",
                name=f"{work.model.name}: {', '.join(group)}",
                most_s=MOST_SHARE * context.left_s,
                config=plain,
                contenders=group,
                warmup=plan.warmup,
                rounds=plan.rounds,
                batches=plan.batches,
            )
        except NotMeasured as lost:
            if lost.failure.cause == "out-of-memory" and len(group) > 1:
                # Then each by itself: the memory does not suffice for several.
                waiting += [[who] for who in group if who not in by_contender]
                continue
            for who in group:
                row = failed(PART, work.model.name, LABELS[who], lost.failure, ours=who == ENGINE, config=plain)
                by_contender.setdefault(who, row)
            continue
        reference = reference or result["losses"].get(ENGINE) or []
        for who in group:
            if who not in by_contender or by_contender[who].failure is not None:
                by_contender[who] = row_of(context, config, who, result, reference)
    rows = [with_ratio(row, by_contender.get(ENGINE)) for row in by_contender.values()]
    return sorted(rows, key=lambda row: [*LABELS.values()].index(row.contender))


def with_ratio(row: BenchRow, ours: BenchRow | None) -> BenchRow:
    """Return the row with its ratio to our engine, also where the two had no turns in one process."""
    if row.ratio is not None or row.ours or row.seconds is None or ours is None or ours.seconds is None:
        return row
    return row.model_copy(update={"ratio": ours.seconds / row.seconds, "paired": False})


def row_of(
    context: Context, config: TrainConfig, who: str, result: dict[str, Any], reference: Sequence[float]
) -> BenchRow:
    """Return the row of one contender of a task, compared with our engine where both took turns."""
    base: dict[str, Any] = {"part": PART, "model": config.model.name, "contender": LABELS[who], "ours": who == ENGINE}
    if who in result["failed"]:
        return BenchRow(**base, failure=Failure(cause="error", detail=result["failed"][who]))
    times, ours = result["times"][who], result["times"].get(ENGINE)
    fields: dict[str, Any] = speed(context, config, times)
    if who == ENGINE:
        return BenchRow(**base, **fields, losses=result["losses"][who])
    fields |= {"framework": f"torch {result['torch']}", "paired": ours is not None}
    if ours:
        ratio = median_interval(paired_ratios(under=ours, over=times))
        fields |= {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
    return BenchRow(**base, **fields, **agreement(result["losses"][who], reference))


def foreign_rows(context: Context, work: BenchModel, ours: Sequence[BenchRow]) -> list[BenchRow]:
    """Measure DeepSpeed and megatron-core, each in its own environment and process, after our engine."""
    plan = context.plan
    config = work.config(steps=plan.warmup + plan.batches * 2)
    engine = next((row for row in ours if row.model == work.model.name and row.ours), None)
    rows = []
    for name in FOREIGN:
        framework = load_framework(name)
        adapter = name.partition("/")[0]
        base: dict[str, Any] = {"framework": version_of(framework), "note": REMARKS[adapter], "paired": False}
        plain = config.model_dump(mode="json")
        try:
            outcome = context.ranks(name, config, name=f"{work.model.name}: {framework.label}", most_s=FOREIGN_MOST_S)
        except NotMeasured as lost:
            rows.append(failed(PART, work.model.name, framework.label, lost.failure, **base, config=plain))
            continue
        fields = speed(context, config, steady(outcome.batch_times_s, plan.warmup))
        if engine is not None and engine.seconds is not None:
            fields["ratio"] = engine.seconds / fields["seconds"]
        fields |= agreement(outcome.losses, [] if engine is None else engine.losses)
        rows.append(BenchRow(part=PART, model=work.model.name, contender=framework.label, **base, **fields))
    return rows
