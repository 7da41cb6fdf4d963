"""Activations that the memory model predicts, beside those that the engine counts."""

from __future__ import annotations

import pytest
import torch

from axonn.config.train_config import PrecisionConfig
from axonn.distributed.transport import InProcessCollectives, InProcessTransport, InProcessWorld
from axonn.engine import Engine
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import make_model, outline_of
from axonn.perf.layers.layer_work import work_of
from axonn.perf.strategy import Strategy
from axonn.perf.timing.memory_model import activation_bytes, link_bytes, model_state_bytes
from tests.helpers.training import ROWS, Case, batch_of, make_engine

MODEL = GPTConfig(name="wide", layers=4, hidden=128, heads=4, seq_len=16, vocab=128, dropout=0.1, attention_dropout=0.1)
SIZE = 2


def predicted(model: GPTConfig, grid: ProcessGrid, rows: int, together: int | None) -> int:
    """Of one microbatch on a grid without stages, in single precision."""
    outline = outline_of(model)
    extents = ProcessGrid(data=grid.data, row=grid.row, col=grid.col)
    links = link_bytes(outline, Strategy(grid=extents, microbatch_size=rows, compute="float32"))
    kept, _ = activation_bytes(links, range(len(links)), together=together)
    return kept + 4 * work_of(outline.loss, grid, rows).saved.wide


@pytest.mark.parametrize("together", [None, 1, 2, 4])
@pytest.mark.parametrize("grid", [ProcessGrid(), ProcessGrid(row=2), ProcessGrid(col=2)], ids=str)
def test_activations_of_a_gpt_are_those_that_the_engine_counts(grid: ProcessGrid, together: int | None) -> None:
    """Within 5%: what is left are moments of norms, and indices."""
    tokens = torch.randint(0, MODEL.vocab, (2 * SIZE, MODEL.seq_len))
    world = InProcessWorld(grid.size)

    def counted(rank: int) -> dict[str, int]:
        engine = Engine(
            make_model(MODEL),
            grid=grid,
            rank=rank,
            batch_size=2 * SIZE,
            microbatch_size=SIZE,
            transport=InProcessTransport(world, rank),
            collectives=InProcessCollectives(world, grid, rank),
            precision=PrecisionConfig(),
            activation_checkpointing=together,
            overdecomposition=1,
        )
        engine.train_batch(tokens, tokens)
        return engine.memory()

    expected = predicted(MODEL, grid, SIZE, together)
    for memory in world.run(counted):
        assert expected == pytest.approx(memory["activations"], rel=0.05)
        phi = sum(outline_of(MODEL).parameters([range(len(outline_of(MODEL).links))], grid).values())
        held = memory["parameters"] + memory["gradients"] + memory["optimizer_state"]
        assert held == model_state_bytes(phi, compute="float32") == 16 * phi


@pytest.mark.parametrize("together", [None, 1, 2])
def test_activations_of_a_unet_are_not_underestimated_by_much(together: int | None) -> None:
    """Skips that several checkpoints hand on are kept once, but counted with each of them."""
    case = Case(recompute=together, microbatches=4, dtype="float32", steps=1, model_kind="unet")
    engine = make_engine(case, 0, None, None)
    engine.train_batch(*batch_of(case, 0))
    ratio = predicted(case.model, ProcessGrid(), ROWS, together) / engine.memory()["activations"]  # type: ignore[arg-type]
    assert 0.95 < ratio < 1.5
