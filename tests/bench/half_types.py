"""How far runs of other grids part from one rank, by the type that is computed in: the figures of docs/determinism.md.

    .venv/bin/python -m tests.bench.half_types [--steps 60]

Trains one small GPT on the licence's text with the engine, all ranks in this process, on every grid from the same
weights, and prints the largest relative difference to one rank: of any batch's loss, and of the mean loss of held-out
rows at the end. Differences, no times: the machine may be busy.
"""

from __future__ import annotations

import argparse

import torch

from axonn.config.train_config import PrecisionConfig
from axonn.data.text import TextData
from axonn.distributed.transport import InProcessCollectives, InProcessTransport, InProcessWorld
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import make_model
from axonn.optim.algorithms.adamw import AdamWConfig
from experiments.definition import ROOT

PRECISIONS = {
    "float32": PrecisionConfig(),
    "bfloat16": PrecisionConfig(compute="bfloat16"),
    "float16": PrecisionConfig(compute="float16", loss_scale=1024.0),
}
GRIDS = {
    "1 rank": ProcessGrid(),
    "2 stages": ProcessGrid(inter=2),
    "2 replicas": ProcessGrid(data=2),
    "row 2 x col 2": ProcessGrid(row=2, col=2),
}
MODEL = GPTConfig(name="small", layers=2, hidden=64, heads=4, seq_len=32, vocab=256)
OPTIMIZER = AdamWConfig(lr=1e-3, clip_norm=1.0)
BATCH, MICROBATCH = 16, 4
HELD_OUT = 4
"""Batches."""


def losses_of(grid: ProcessGrid, precision: PrecisionConfig, steps: int) -> tuple[list[float], float]:
    """Of every batch, and of held-out rows at the end."""
    data = TextData(ROOT / "LICENSE", seq_len=MODEL.seq_len, vocab=MODEL.vocab, seed=0, held_out=0.1)
    world = InProcessWorld(grid.size)

    def train(rank: int) -> tuple[list[float], float]:
        engine = Engine(
            make_model(MODEL),
            grid=grid,
            rank=rank,
            batch_size=BATCH,
            microbatch_size=MICROBATCH,
            transport=InProcessTransport(world, rank),
            collectives=InProcessCollectives(world, grid, rank),
            optimizer=OPTIMIZER,
            precision=precision,
        )
        losses = [engine.train_batch(*data.batch(engine.shard(step))).loss for step in range(steps)]
        held_out = [engine.evaluate_batch(*data.held_out_batch(engine.shard(number))) for number in range(HELD_OUT)]
        return losses, sum(held_out) / HELD_OUT

    return world.run(train)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print(f"{'type':10}{'grid':16}{'loss, first':>12}{'loss, last':>12}{'any batch':>12}{'held out':>12}")
    for dtype, precision in PRECISIONS.items():
        expected = losses_of(GRIDS["1 rank"], precision, steps)
        for name, grid in GRIDS.items():
            losses, held_out = losses_of(grid, precision, steps)
            batch = max(abs(a / b - 1) for a, b in zip(losses, expected[0], strict=True))
            apart = abs(held_out / expected[1] - 1)
            print(f"{dtype:10}{name:16}{losses[0]:12.4f}{losses[-1]:12.4f}{batch:12.1e}{apart:12.1e}", flush=True)


if __name__ == "__main__":
    main()
