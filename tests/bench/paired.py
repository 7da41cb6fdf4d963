"""Paired timing of two frameworks in the same ranks: batches alternate, so the machine's drift hits both alike.

Run on every rank: python -m tests.bench.paired SPEC.json OUT.json, where SPEC holds a list of [framework, config].
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from axonn.config import TrainConfig, validate
from axonn.grid import ProcessGrid
from axonn.runtime import connect
from experiments.framework import load_framework


def main(spec_file: str, out_file: str) -> None:
    torch.set_num_threads(1)
    spec = json.loads(Path(spec_file).read_text())
    contenders = [(name, validate(config, TrainConfig, where=spec_file)) for name, config in spec["contenders"]]
    with ExitStack() as stack:
        runtime = stack.enter_context(connect(ProcessGrid(**contenders[0][1].grid.model_dump())))
        trainers = [
            stack.enter_context(load_framework(name).trainer(config, runtime, None)) for name, config in contenders
        ]
        times: list[list[float]] = [[] for _ in trainers]
        losses: list[list[float]] = [[] for _ in trainers]
        for step in range(spec["rounds"] + 1):
            order = range(len(trainers)) if step % 2 else reversed(range(len(trainers)))
            for i in order:
                runtime.barrier()
                start = time.perf_counter()
                losses[i].append(trainers[i].train_batch(step))
                runtime.barrier()
                times[i].append(time.perf_counter() - start)
        if runtime.rank == 0:
            # The first round warms up.
            Path(out_file).write_text(json.dumps({"times": [t[1:] for t in times], "losses": losses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
