"""Task: one GPT, trained by our engine and by plain PyTorch loops that take turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from axonn.config.train_config import TrainConfig, validate
from axonn.distributed.runtime import Runtime, connect
from axonn.grid import ProcessGrid
from axonn.training.engine_framework import EngineTrainer
from baselines.gpu.peaks import wait_for
from baselines.gpu.peers import initial_weights, plain_loop, weights_of
from baselines.rounds import turn_order

ENGINE, LOOP, COMPILED = "engine", "loop", "compiled"
LEAST_ROUNDS = 2
Train = Callable[[int], float]


def trainers(config: TrainConfig, runtime: Runtime, contenders: Sequence[str]) -> dict[str, Train]:
    """Return each contender's function that trains batch number `step`; all begin with the same weights."""
    trained: dict[str, Train] = {}
    weights: dict[str, torch.Tensor] | None = None
    if ENGINE in contenders:
        engine = EngineTrainer(config, runtime, None)
        trained[ENGINE] = engine.train_batch
        weights = weights_of(engine)
    for name in contenders:
        if name != ENGINE:
            source = initial_weights(config) if weights is None else weights
            trained[name] = plain_loop(config, source, runtime.device, compiled=name == COMPILED).train_batch
    return trained


def run(
    *,
    device: torch.device,
    seconds: float,
    config: Mapping[str, Any],
    contenders: Sequence[str],
    warmup: int,
    rounds: int,
    batches: int,
) -> dict[str, Any]:
    """Return `losses` of the warm-up and of all turns and `times` (seconds of a batch, one for each turn) by contender,
    or the reason why there are none in `failed`.

    Turns alternate in order and in reversed order.
    """
    began = time.monotonic()
    wanted = validate(dict(config), TrainConfig, where="task")
    with connect(ProcessGrid(), device=device) as runtime:
        trained = trainers(wanted, runtime, contenders)
        failed: dict[str, str] = {}
        losses: dict[str, list[float]] = {name: [] for name in contenders}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for name in contenders:
            try:
                losses[name] += [trained[name](step) for step in range(warmup)]
                wait_for(device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # A missing compiler does not keep the others from being measured.
                failed[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:400]
        going = [name for name in contenders if name not in failed]
        for number in range(rounds):
            if number >= LEAST_ROUNDS and time.monotonic() - began > seconds:
                break
            for name in turn_order(going, number):
                first = warmup + number * batches
                wait_for(device)
                start = time.perf_counter()
                losses[name] += [trained[name](step) for step in range(first, first + batches)]
                wait_for(device)
                times[name].append((time.perf_counter() - start) / batches)
    return {
        "losses": losses,
        "times": times,
        "failed": failed,
        "torch": torch.__version__,
    }
