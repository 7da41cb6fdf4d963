"""Paired timing of frameworks in the same ranks: batches alternate, so the machine's drift hits all alike.

Run on every rank: python -m tests.bench.paired SPEC.json OUT.json, where SPEC holds a list of [framework, config].
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from axonn.config import TrainConfig, validate
from axonn.grid import ProcessGrid
from axonn.runtime import connect
from axonn.trace import SpanKind, SpanRecorder
from experiments.engine_framework import EngineTrainer
from experiments.framework import Trainer, load_framework
from tests.bench.jitter import Sleeps

COMPUTE = (SpanKind.FORWARD, SpanKind.BACKWARD, SpanKind.BACKWARD_INPUT, SpanKind.BACKWARD_WEIGHT)


def layers_of(trainer: Any) -> dict[str, nn.Module]:
    """The modules of this rank's layers, by name."""
    if isinstance(trainer, EngineTrainer):
        return {name: layer for chunk in trainer.engine.chunks for name, layer in chunk.chain.items()}
    found: dict[str, nn.Module] = trainer.layers()
    return found


def memory_of(trainer: Trainer) -> dict[str, int] | None:
    return trainer.engine.memory() if isinstance(trainer, EngineTrainer) else None


def tail_of(spans: SpanRecorder | None) -> float:
    """Seconds since this rank's last task of the pipeline: reduction and step."""
    if spans is None:
        return 0.0
    last = max((s.end for s in spans.spans if s.kind in COMPUTE), default=spans.now())
    spans.spans.clear()
    return spans.now() - last


def main(spec_file: str, out_file: str) -> None:
    torch.set_num_threads(1)
    spec = json.loads(Path(spec_file).read_text())
    contenders = [(name, validate(config, TrainConfig, where=spec_file)) for name, config in spec["contenders"]]
    with ExitStack() as stack:
        runtime = stack.enter_context(connect(ProcessGrid(**contenders[0][1].grid.model_dump())))
        recorders = [SpanRecorder(runtime.rank) if spec["tails"] else None for _ in contenders]
        trainers = [
            stack.enter_context(load_framework(name).trainer(config, runtime, spans))
            for (name, config), spans in zip(contenders, recorders, strict=True)
        ]
        sleeps = [Sleeps(**spec["jitter"]).attach(layers_of(t)) for t in trainers] if spec["jitter"] else []
        times: list[list[float]] = [[] for _ in trainers]
        losses: list[list[float]] = [[] for _ in trainers]
        tails: list[list[float]] = [[] for _ in trainers]
        for step in range(spec["rounds"] + 1):
            for sleep in sleeps:
                sleep.begin(step)
            order = range(len(trainers)) if step % 2 else reversed(range(len(trainers)))
            for i in order:
                runtime.barrier()
                start = time.perf_counter()
                losses[i].append(trainers[i].train_batch(step))
                tails[i].append(tail_of(recorders[i]))
                runtime.barrier()
                times[i].append(time.perf_counter() - start)
        if runtime.rank == 0:
            # The first round warms up.
            result = {
                "times": [t[1:] for t in times],
                "tails": [t[1:] for t in tails],
                "losses": losses,
                "memory": [memory_of(t) for t in trainers],
            }
            Path(out_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
