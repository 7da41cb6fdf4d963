"""Part largest: the largest GPT that trains on this one device, with the optimizer's state on it and on the host."""

from __future__ import annotations

from typing import Any

from axonn.config.train_config import TrainConfig, validate
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.observability.records import Failure
from axonn.perf.timing.memory_model import model_state_bytes
from axonn.training.capacity import free_memory
from baselines.adapters.adapter_common import gpt_of
from baselines.gpu.bench_context import Context, NotMeasured
from baselines.gpu.bench_rows import BenchRow, failed
from baselines.gpu.parts.part_offload import ENGINE

PART = "largest"
PROBES = 3
"""Most models that are tried for each placement."""
MODEL_SHARE = 0.93
"""Share of the device's memory that the first model needs by the memory model, with its activations."""
HOST_SHARE = 0.85
"""Share of the host's free memory that pinned buffers may take."""
SHARES = {"device": 0.4, "offloaded": 1.0}
"""Share of the time after which a placement is done: pinning host memory takes long."""


def model_of(context: Context, layers: int) -> GPTConfig:
    plan = context.plan
    shape = plan.gpts[-1].model
    hidden = plan.largest_hidden
    heads = max(1, hidden // (128 if hidden >= 1024 else 16))
    name = f"gpt-{layers}x{hidden}"
    return GPTConfig(name=name, layers=layers, hidden=hidden, heads=heads, seq_len=shape.seq_len, vocab=shape.vocab)


def config_of(context: Context, placement: str, layers: int) -> TrainConfig:
    """Return a configuration with one sequence at a time and every layer recomputed, so that state fills the memory."""
    content = {
        "model": model_of(context, layers).model_dump(),
        "batch_size": 2,
        "microbatch_size": 1,
        "precision": "bfloat16",
        "activation_checkpointing": 1,
        "optimizer": {"placement": placement, "bsize": context.plan.bsize},
    }
    return validate(content, TrainConfig, where=PART)


def device_bytes(config: TrainConfig) -> int:
    """Return the bytes by the memory model, with the inputs of all layers, what one layer recomputes, and the
    logits."""
    model, optimizer = gpt_of(config), config.optimizer
    state = model_state_bytes(
        model.parameters,
        optimizer=optimizer.placement,
        bsize=optimizer.bsize,
        buckets=optimizer.buckets_resident,
        compute="bfloat16",
    )
    return state + model.seq_len * (2 * model.hidden * model.layers + 34 * model.hidden + 12 * model.vocab)


def pinned_bytes(config: TrainConfig) -> int:
    """Return the pinned bytes of host memory: float32 masters and two moments."""
    return 0 if config.optimizer.placement == "device" else 12 * config.model.parameters


def most_layers(context: Context, placement: str, *, device: int, host: int) -> tuple[int, str]:
    """Return the layers that fit by the model, at least 1, and what keeps more from fitting."""
    layers, why = 1, "the largest that is tried"
    while layers < context.plan.largest_limit:
        config = config_of(context, placement, layers + 1)
        if pinned_bytes(config) > HOST_SHARE * host:
            return layers, "host memory"
        if device_bytes(config) > MODEL_SHARE * device:
            return layers, "device memory"
        layers += 1
    return layers, why


def measure(context: Context) -> tuple[list[BenchRow], dict[str, Any]]:
    """Measure each placement: a model that should just fit, then larger or smaller ones by halves of the bracket."""
    total = None if context.peak is None else context.peak.memory
    host = free_memory() or 0
    about: dict[str, Any] = {
        "device_bytes": total,
        "free_host_bytes": host,
        "how": f"hidden {context.plan.largest_hidden}, batches of 2 sequences, one at a time, every layer recomputed; "
        f"{PROBES} models are tried at most",
    }
    rows = []
    start = context.clock()
    for placement in ENGINE:
        part_deadline = context.deadline
        context.deadline = start + (part_deadline - start) * SHARES[placement]
        rows.append(search(context, placement, device=total, host=host))
        context.deadline = part_deadline
    return rows, about


def next_layers(trains: int | None, refused: int | None, ceiling: int) -> int | None:
    """Return the layers to try after the largest model that trains and the smallest that does not; None when there is
    nothing between.

    With only one of the two known it goes up by a twelfth, or down by an eighth, so that some model is found to train.
    """
    if trains is None:
        assert refused is not None, "one of the two has been tried"
        return refused - max(1, refused // 8) if refused > 1 else None
    if refused is None:
        return min(ceiling, trains + max(1, trains // 12)) if trains < ceiling else None
    middle = (trains + refused) // 2
    return middle if trains < middle < refused else None


def search(context: Context, placement: str, *, device: int | None, host: int) -> BenchRow:
    label = ENGINE[placement]
    # On a CPU nothing runs out: the miniature tries the search itself, up to its limit.
    guess, why = most_layers(context, placement, device=device or 1 << 60, host=host if device else 1 << 60)
    ceiling = context.plan.largest_limit if why != "host memory" else guess
    best: tuple[int, dict[str, Any]] | None = None
    refused: tuple[int, Failure] | None = None
    tried: list[str] = []
    layers = guess
    for _ in range(PROBES):
        config = config_of(context, placement, layers)
        try:
            result = context.task(
                "fits", name=f"{config.model.name} {placement}", config=config.model_dump(mode="json")
            )
            best = (layers, result)
            tried.append(f"{layers} layers: trains")
        except NotMeasured as lost:
            refused = (layers, lost.failure)
            tried.append(f"{layers} layers: {lost.failure.cause}")
            if lost.failure.cause != "out-of-memory":
                break
        step = next_layers(None if best is None else best[0], None if refused is None else refused[0], ceiling)
        if step in (None, layers):
            break
        layers = step
    if best is None:
        assert refused is not None
        return failed(PART, model_of(context, refused[0]).name, label, refused[1], ours=True, note="; ".join(tried))
    layers, result = best
    config = config_of(context, placement, layers)
    more = refused[1].cause if refused is not None else "no larger one was tried"
    limit = f"; more layers: {more}" if why != "host memory" or refused is not None else "; limited by host memory"
    memory = dict(result["memory"])
    if result["batch_peak"] is not None:
        memory["batch_peak"] = result["batch_peak"]
    return BenchRow(
        part=PART,
        model=config.model.name,
        contender=label,
        ours=True,
        parameters=config.model.parameters,
        seconds=result["seconds"],
        memory=memory,
        model_bytes=device_bytes(config),
        note="; ".join(tried) + limit,
    )
