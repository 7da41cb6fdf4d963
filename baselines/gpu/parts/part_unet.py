"""Part unet: images/s of a diffusion U-Net."""

from __future__ import annotations

from typing import Any

from axonn.config.train_config import TrainConfig, validate
from baselines.gpu.bench_context import Context, NotMeasured
from baselines.gpu.bench_rows import BenchRow, failed
from baselines.gpu.parts.parts_common import speed

PART = "unet"
LABEL = "AxoNN"


def measure(context: Context) -> tuple[list[BenchRow], dict[str, Any]]:
    plan = context.plan
    content = {
        "model": plan.unet.model_dump(),
        "batch_size": plan.unet_batch,
        "microbatch_size": plan.unet_microbatch,
        "precision": "bfloat16",
        "steps": plan.warmup + plan.rounds,
    }
    config = validate(content, TrainConfig, where=PART)
    try:
        result = context.task(
            "images",
            name=plan.unet.name,
            config=config.model_dump(mode="json"),
            warmup=plan.warmup,
            batches=plan.rounds,
        )
    except NotMeasured as lost:
        return [failed(PART, plan.unet.name, LABEL, lost.failure, ours=True, config=config.model_dump(mode="json"))], {}
    memory = {} if result["peak"] is None else {"batch_peak": result["peak"]}
    row = BenchRow(
        part=PART,
        model=plan.unet.name,
        contender=LABEL,
        ours=True,
        losses=result["losses"],
        memory=memory,
        **speed(context, config, result["times"]),
    )
    return [row], {}
