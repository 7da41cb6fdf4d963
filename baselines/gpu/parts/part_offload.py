"""Part offload: device memory and time with the optimizer's state on the device and in host memory."""

from __future__ import annotations

from typing import Any

from axonn.config.train_config import TrainConfig
from axonn.perf.timing.memory_model import model_state_bytes
from axonn.training.framework import load_framework, version_of
from baselines.gpu.bench_context import Context, NotMeasured
from baselines.gpu.bench_rows import BenchRow, failed
from baselines.gpu.parts.parts_common import agreement, speed, steady

PART = "offload"
ENGINE = {"device": "AxoNN, state on the device", "offloaded": "AxoNN, offloaded"}
FSDP = "PyTorch fully_shard, CPUOffloadPolicy"
ZERO = "deepspeed/zero-2-offload"
MOST_S = 60.0


def state_by_model(config: TrainConfig) -> int:
    """Return the bytes of model state on the device by the memory model."""
    optimizer = config.optimizer
    return model_state_bytes(
        config.model.parameters,
        optimizer=optimizer.placement,
        bsize=optimizer.bsize,
        buckets=optimizer.buckets_resident,
        compute=config.precision.compute,
    )


def config_of(context: Context, placement: str) -> TrainConfig:
    plan = context.plan
    optimizer = {"placement": placement, "bsize": plan.bsize}
    return plan.offload.config(steps=plan.warmup + plan.rounds, optimizer=optimizer)


def measure(context: Context) -> tuple[list[BenchRow], dict[str, Any]]:
    """Measure our engine in both ways, then PyTorch's and DeepSpeed's offloading of the same model."""
    resident_row = engine_row(context, "device")
    rows = [resident_row, engine_row(context, "offloaded", reference=resident_row)]
    rows += [fsdp_row(context), zero_row(context)]
    ours = {row.contender: row for row in rows if row.ours and row.failure is None}
    about: dict[str, Any] = {
        "counted_by": "the allocator of the device"
        if context.plan.device == "cuda"
        else "adding up tensors, since nobody counts what is allocated on a CPU",
    }
    if len(ours) == len(ENGINE):
        resident, offloaded = (ours[label].memory["after_init"] for label in ENGINE.values())
        about["offloaded_over_resident"] = offloaded / resident
    return [with_ratio(row, ours.get(ENGINE["offloaded"])) for row in rows], about


def engine_row(context: Context, placement: str, *, reference: BenchRow | None = None) -> BenchRow:
    """Measure our engine. `reference`: a row with the losses of the same batches."""
    plan, label = context.plan, ENGINE[placement]
    config = config_of(context, placement)
    try:
        result = context.task(
            "memory",
            name=f"{config.model.name}: {label}",
            most_s=MOST_S,
            config=config.model_dump(mode="json"),
            warmup=plan.warmup,
            batches=plan.rounds,
        )
    except NotMeasured as lost:
        return failed(PART, config.model.name, label, lost.failure, ours=True, config=config.model_dump(mode="json"))
    memory, model = result["memory"], state_by_model(config)
    compared = [] if reference is None else reference.losses
    return BenchRow(
        part=PART,
        model=config.model.name,
        contender=label,
        ours=True,
        memory=memory,
        model_bytes=model,
        model_error_pct=100 * (model / memory["after_init"] - 1),
        **speed(context, config, result["times"]),
        **({"losses": result["losses"]} if not compared else agreement(result["losses"], compared)),
    )


def fsdp_row(context: Context) -> BenchRow:
    plan = context.plan
    config = config_of(context, "offloaded")
    try:
        result = context.task(
            "fsdp",
            name=f"{config.model.name}: {FSDP}",
            most_s=MOST_S,
            config=config.model_dump(mode="json"),
            warmup=plan.warmup,
            batches=plan.rounds,
        )
    except NotMeasured as lost:
        return failed(PART, config.model.name, FSDP, lost.failure)
    return BenchRow(
        part=PART,
        model=config.model.name,
        contender=FSDP,
        framework=f"torch {result['torch']}",
        memory=result["memory"],
        note="float32 weights and moments on the host, AdamW on its cores; weights are PyTorch's own",
        **speed(context, config, result["times"]),
    )


def zero_row(context: Context) -> BenchRow:
    """Measure DeepSpeed. Its peak is that of complete batches, as its ranks report it."""
    framework = load_framework(ZERO)
    config = config_of(context, "device").model_copy(update={"steps": context.plan.warmup + 2})
    base: dict[str, Any] = {"framework": version_of(framework)}
    try:
        name = f"{config.model.name}: {framework.label}"
        # CPUAdam steps on the host's cores.
        outcome = context.ranks(ZERO, config, name=name, most_s=MOST_S, threads=context.host_threads)
    except NotMeasured as lost:
        return failed(PART, config.model.name, framework.label, lost.failure, **base)
    peak = {"batch_peak": outcome.memory_bytes} if outcome.memory_bytes and context.plan.device == "cuda" else {}
    return BenchRow(
        part=PART,
        model=config.model.name,
        contender=framework.label,
        memory=peak,
        note="ZeRO-Offload: CPUAdam on the host's cores",
        **base,
        **speed(context, config, steady(outcome.batch_times_s, context.plan.warmup)),
    )


def with_ratio(row: BenchRow, ours: BenchRow | None) -> BenchRow:
    """Return the row with the seconds of our offloaded engine over its own."""
    if ours is None or ours.seconds is None or row.seconds is None or row is ours:
        return row
    return row.model_copy(update={"ratio": ours.seconds / row.seconds, "paired": False})
