"""Part overlap: how much of the offloaded optimizer's copies, and of the tensor axes' collectives, is hidden."""

from __future__ import annotations

from typing import Any

from axonn.spans import overlap
from axonn.training.run_record import spans_of
from baselines.gpu.bench_context import Context, NotMeasured
from baselines.gpu.bench_rows import BenchRow, failed
from baselines.gpu.parts.part_offload import config_of

PART = "overlap"
COPIES, COLLECTIVES = "copies of the offloaded optimizer", "collectives on 1 x 2 ranks"
MOST_S = 90.0


def measure(context: Context) -> tuple[list[BenchRow], dict[str, Any]]:
    """Measure copies on one rank, and collectives with 1 and with 2 sub-shards."""
    rows = copies(context)
    rows += [collectives(context, shards) for shards in (1, 2)]
    about = {
        "copies": "of the time in which something is copied, the part that does not make the step longer than with the "
        "state on the device",
        "copies_under_spans": "of the same time, the part under spans of compute or of the optimizer, which waits for "
        "copies inside of its spans",
        "collectives": "of the time in which a collective of the tensor axes is under way, the part under compute",
    }
    return rows, about


def copies(context: Context) -> list[BenchRow]:
    plan = context.plan
    config = config_of(context, "offloaded")
    try:
        result = context.task(
            "copies",
            name=COPIES,
            most_s=MOST_S,
            config=config.model_dump(mode="json"),
            warmup=plan.warmup,
            batches=plan.rounds,
        )
    except NotMeasured as lost:
        return [failed(PART, config.model.name, COPIES, lost.failure, ours=True)]
    tails = result["tail_s"]
    note = (
        f"step {1e3 * tails['device']:.1f} ms with the state on the device, {1e3 * tails['offloaded']:.1f} ms "
        f"offloaded, of which something is copied for {1e3 * result['copies_s']:.1f} ms"
    )
    common: dict[str, Any] = {"part": PART, "model": config.model.name, "ours": True}
    return [
        BenchRow(**common, contender=COPIES, share=result["hidden"], share_of="copies hidden", note=note),
        BenchRow(
            **common,
            contender=f"{COPIES}, by spans",
            share=result["under_spans"],
            share_of="copies under spans of compute and optimizer",
        ),
    ]


def collectives(context: Context, shards: int) -> BenchRow:
    plan = context.plan
    label = f"{COLLECTIVES}, {shards} sub-shard{'s' if shards > 1 else ''}"
    config = plan.cut.config(steps=plan.warmup + plan.rounds, grid={"col": 2}, overdecomposition=shards)
    try:
        # On a GPU the cores only make initial weights; on a CPU each rank computes on one.
        threads = max(1, context.host_threads // 2)
        context.ranks("axonn", config, name=label, most_s=MOST_S, threads=threads)
    except NotMeasured as lost:
        return failed(PART, config.model.name, label, lost.failure, ours=True)
    measured = overlap(spans_of(context.folder(label), config, first=plan.warmup, last=config.steps))
    return BenchRow(
        part=PART,
        model=config.model.name,
        contender=label,
        ours=True,
        share=measured.hidden_share,
        share_of="collectives hidden under compute",
        note=f"{1e3 * measured.collective / plan.rounds:.1f} ms of collectives in a batch; both ranks share the device",
    )
