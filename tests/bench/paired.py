"""Paired timing of frameworks in the same ranks: batches alternate, so the machine's drift hits all alike.

Run on every rank: python -m tests.bench.paired SPEC.json OUT.json, where SPEC holds a list of [framework, config].
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from axonn.config.train_config import TrainConfig, validate
from axonn.distributed.collectives import TorchCollectives
from axonn.distributed.runtime import Runtime, connect
from axonn.grid import AXES, ProcessGrid
from axonn.observability.traffic import summary
from axonn.spans import SpanKind, SpanRecorder, overlap
from axonn.training.engine_framework import EngineTrainer
from axonn.training.framework import InProcessFramework, Trainer, load_framework
from baselines.adapters.pytorch.pytorch_tensor import CountedCollectives, TorchTensorParallelTrainer
from baselines.rounds import turn_order
from tests.bench.jitter import Sleeps

COMPUTE = (SpanKind.FORWARD, SpanKind.BACKWARD, SpanKind.BACKWARD_INPUT, SpanKind.BACKWARD_WEIGHT)


def layers_of(trainer: Any) -> dict[str, nn.Module]:
    """The modules of this rank's layers, by name."""
    if isinstance(trainer, EngineTrainer):
        return {name: layer for chunk in trainer.engine.chunks for name, layer in chunk.chain.items()}
    found: dict[str, nn.Module] = trainer.layers()
    return found


def in_process(name: str) -> InProcessFramework:
    framework = load_framework(name)
    assert isinstance(framework, InProcessFramework), f"{name} does not run in this environment"
    return framework


def on_grid(runtime: Runtime, grid: ProcessGrid) -> Runtime:
    """The same ranks as another grid."""
    if runtime.collectives.grid == grid:
        return runtime
    return replace(runtime, collectives=TorchCollectives(grid, runtime.rank))


def memory_of(trainer: Trainer) -> dict[str, int] | None:
    return trainer.engine.memory() if isinstance(trainer, EngineTrainer) else None


def tail_of(spans: SpanRecorder | None) -> float:
    """Seconds since this rank's last task of the pipeline: reduction and step."""
    if spans is None:
        return 0.0
    last = max((s.end for s in spans.spans if s.kind in COMPUTE), default=spans.now())
    return spans.now() - last


def overlap_of(spans: SpanRecorder | None, runtime: Runtime) -> list[list[float]]:
    """The overlap of the last batch, mean over ranks, in a list; nothing without spans."""
    if spans is None:
        return []
    mine = torch.tensor(overlap(spans.spans), dtype=torch.float64)
    spans.spans.clear()
    group = runtime.collectives.axis_group(AXES)
    runtime.collectives.all_reduce(mine, group).wait()
    return [(mine / len(group.ranks)).tolist()]


def train_counted(trainer: Trainer, step: int, ranks: int) -> tuple[float, float | None]:
    """Loss of a batch, and bytes that this rank sends in its collectives; None where nobody counts them."""
    if isinstance(trainer, TorchTensorParallelTrainer):
        with CountedCollectives(range(ranks)) as counted:
            loss = trainer.train_batch(step)
        traffic = summary(counted.calls)
    else:
        loss = trainer.train_batch(step)
        traffic = trainer.engine.traffic() if isinstance(trainer, EngineTrainer) else None
    return loss, None if traffic is None else sum(part.sent_bytes for part in traffic)


def main(spec_file: str, out_file: str) -> None:
    torch.set_num_threads(1)
    spec = json.loads(Path(spec_file).read_text())
    contenders = [(name, validate(config, TrainConfig, where=spec_file)) for name, config in spec["contenders"]]
    with ExitStack() as stack:
        grids = [config.grid for _, config in contenders]
        runtime = stack.enter_context(connect(grids[0]))
        recorders = [SpanRecorder(runtime.rank) if spec["spans"] else None for _ in contenders]
        trainers = [
            stack.enter_context(in_process(name).trainer(config, on_grid(runtime, grid), spans))
            for (name, config), grid, spans in zip(contenders, grids, recorders, strict=True)
        ]
        sleeps = [Sleeps(**spec["jitter"]).attach(layers_of(t)) for t in trainers] if spec["jitter"] else []
        times: list[list[float]] = [[] for _ in trainers]
        losses: list[list[float]] = [[] for _ in trainers]
        tails: list[list[float]] = [[] for _ in trainers]
        overlaps: list[list[list[float]]] = [[] for _ in trainers]
        sent: list[float | None] = [None for _ in trainers]
        for step in range(spec["rounds"] + 1):
            for sleep in sleeps:
                sleep.begin(step)
            # The first round warms up.
            for i in turn_order(range(len(trainers)), step - 1):
                runtime.barrier()
                start = time.perf_counter()
                if step == 0:
                    loss, sent[i] = train_counted(trainers[i], step, grids[i].size)
                else:
                    loss = trainers[i].train_batch(step)
                losses[i].append(loss)
                tails[i].append(tail_of(recorders[i]))
                runtime.barrier()
                times[i].append(time.perf_counter() - start)
                overlaps[i] += overlap_of(recorders[i], runtime)
        if runtime.rank == 0:
            result = {
                "times": [t[1:] for t in times],
                "tails": [t[1:] for t in tails],
                "overlaps": [o[1:] for o in overlaps],
                "sent_bytes": sent,
                "losses": losses,
                "memory": [memory_of(t) for t in trainers],
            }
            Path(out_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
