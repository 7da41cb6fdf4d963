"""What a stage keeps for its backwards: which layers are recomputed, and how many bytes are left."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from axonn.config.defaults import default_checkpoint_blocks
from axonn.errors import ConfigError
from axonn.inter_layer.stage import StageChunk, initialise, segments
from axonn.models.base import Layer
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.gpt.gpt_model import GPT
from axonn.tensor import TensorContext
from tests.helpers.training import ROWS, Case, batch_of, make_engine

MODEL = GPT(GPTConfig(name="t", layers=4, hidden=16, heads=2, seq_len=8, vocab=32))


@pytest.mark.parametrize(
    ("recompute", "span", "expected"),
    [
        (None, range(10), [(0, 10, False)]),
        (1, range(10), [(0, 1, False), (1, 3, True), (3, 5, True), (5, 7, True), (7, 9, True), (9, 10, False)]),
        (2, range(10), [(0, 1, False), (1, 5, True), (5, 9, True), (9, 10, False)]),
        (9, range(10), [(0, 1, False), (1, 9, True), (9, 10, False)]),
        # Cut inside of a block, what lies here of it counts as one.
        (1, range(2, 6), [(0, 1, True), (1, 3, True), (3, 4, True)]),
        (2, range(2, 6), [(0, 3, True), (3, 4, True)]),
        (1, range(9, 10), [(0, 1, False)]),
    ],
)
def test_segments(recompute: int | None, span: range, expected: list[tuple[int, int, bool]]) -> None:
    assert segments([MODEL.layers[i] for i in span], recompute) == expected


def test_the_default_is_the_published_optimum_at_the_published_limit() -> None:
    """One microbatch in flight per stage: the divisor of the layers per stage nearest sqrt(N)."""
    assert default_checkpoint_blocks(8, limit=6) == 8  # N = 48, sqrt 6.9
    assert default_checkpoint_blocks(4, limit=4) == 4
    assert default_checkpoint_blocks(16, limit=1) == 4
    assert default_checkpoint_blocks(16, limit=2) == 4  # sqrt(32) = 5.7; 4 is nearer than 8
    assert default_checkpoint_blocks(0, limit=3) == 1


@given(blocks=st.integers(1, 60), limit=st.integers(1, 40), chunks=st.integers(1, 3))
def test_no_divisor_is_nearer(blocks: int, limit: int, chunks: int) -> None:
    found = default_checkpoint_blocks(blocks, limit=limit, chunks=chunks)
    best = math.sqrt(limit * blocks * chunks)
    assert blocks % found == 0
    assert all(abs(found - best) <= abs(d - best) for d in range(1, blocks + 1) if blocks % d == 0)


def test_recomputing_keeps_gradients_to_the_bit() -> None:
    x = torch.randint(0, 32, (3, 8))
    gradients = []
    for recompute in (None, 1, 3):
        chunk = StageChunk(
            MODEL,
            range(10),
            context=TensorContext.serial(),
            dtype=torch.float32,
            device=torch.device("cpu"),
            recompute=recompute,
        )
        initialise(MODEL, chunk, seed=1)
        (logits,) = chunk(x)
        MODEL.loss(logits, x, TensorContext.serial()).backward()
        gradients.append([p.grad for p in chunk.parameters() if p.grad is not None])
    assert all(len(g) == len(gradients[0]) > 40 for g in gradients)
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def activation_bytes(recompute: int | None, **changes: int) -> int:
    case = Case(recompute=recompute, microbatches=4, dtype="float32", steps=1, limit=2, **changes)
    engine = make_engine(case, 0, None, None)
    engine.train_batch(*batch_of(case, 0))
    return engine.memory()["activations"]


def test_recomputing_leaves_the_inputs_of_the_segments() -> None:
    """In bytes: what is recomputed keeps one input per segment beside what embedding and head keep."""
    each, pairs = activation_bytes(1), activation_bytes(2)
    case = Case()
    boundary = ROWS * case.model.seq_len * case.model.hidden * 4
    # Six segments against three; a single stage has one microbatch at a time.
    assert each - pairs == 3 * boundary
    assert activation_bytes(None) > 3 * each


def test_layers_with_buffers_are_refused() -> None:
    class Odd:
        layers = (Layer(name="norm", build=lambda context: nn.BatchNorm1d(3), cost=1.0),)
        ties = ()

    with pytest.raises(ConfigError, match=r"have buffers \(norm.running_mean"):
        StageChunk(Odd(), range(1), context=TensorContext.serial(), dtype=torch.float32, device=torch.device("cpu"))  # type: ignore[arg-type]
