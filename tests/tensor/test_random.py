"""Counter-based randomness: a value is a function of (seed, name, index) and of nothing else."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import axonn.tensor.counter_random
from axonn.inter_layer.stage import StageChunk, initialise
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.gpt.gpt_model import GPT
from axonn.models.initialization import Normal, fill
from axonn.tensor import TensorContext
from axonn.tensor.counter_random import normal, random_bits, stream_key, uniform


def filled(*shape: int, seed: int, name: str, std: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.empty(*shape, dtype=dtype)
    fill(tensor, Normal(std), name=name, seed=seed)
    return tensor


@settings(max_examples=50)
@given(st.integers(0, 2**63), st.text(max_size=20), st.integers(1, 3000), st.lists(st.integers(0, 3000), max_size=5))
def test_a_value_does_not_depend_on_who_asks_for_its_neighbours(
    seed: int, name: str, size: int, cuts: list[int]
) -> None:
    key = stream_key(seed, name)
    whole = filled(size, dtype=torch.float64, seed=seed, name=name, std=2.0)
    bounds = sorted({0, size, *(c for c in cuts if c < size)})
    parts = [normal(key, torch.arange(start, end)) * 2.0 for start, end in pairwise(bounds)]
    assert torch.equal(torch.cat(parts), whole)


def test_long_tensors_are_filled_in_chunks_without_a_seam() -> None:
    size = (1 << 20) + 5
    long = filled(size, seed=1, name="w", std=1.0)
    end = normal(stream_key(1, "w"), torch.arange(size - 10, size)).float()
    assert torch.equal(long[-10:], end)


def test_shape_and_global_generator_do_not_matter() -> None:
    torch.manual_seed(1)
    flat = filled(24, seed=3, name="w", std=1.0)
    torch.manual_seed(2)
    assert torch.equal(filled(2, 3, 4, seed=3, name="w", std=1.0).view(-1), flat)


def test_seed_name_counter_and_index_all_matter() -> None:
    keys = [stream_key(s, n, *c) for s in (0, 1, 10) for n in ("a", "b", "0") for c in ((), (0,), (1,), (0, 1))]
    assert len(set(keys)) == len(keys)
    assert stream_key(1, "2") != stream_key(12, "")
    bits = random_bits(stream_key(0, "a"), torch.arange(100_000))
    assert len(bits.unique()) == len(bits)
    assert bits.min() >= 0


def split_mix(key: int, index: int) -> int:
    """SplitMix64 in Python's own integers, less its last bit."""
    x = (index * 0x9E3779B97F4A7C15 + key) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return (x ^ (x >> 31)) >> 1


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**63 - 1))
def test_the_bits_are_those_of_split_mix(key: int, index: int) -> None:
    assert int(random_bits(key, torch.tensor([index]))) == split_mix(key, index)


def test_the_keys_are_the_same_on_every_machine() -> None:
    assert stream_key(7, "block0.fc1.weight") == 1301739787237515118


def test_moments_of_the_normal_values() -> None:
    """Bounds of five standard errors; the values are always the same, so the test cannot fail by chance."""
    n = 1 << 20
    x = normal(stream_key(0, "moments"), torch.arange(n))
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert float((x**power).mean()) == pytest.approx(moment, abs=5 * math.sqrt(variance / n))
    lagged = float((x[1:] * x[:-1]).mean())
    assert abs(lagged) < 5 / math.sqrt(n)
    other = normal(stream_key(0, "moments2"), torch.arange(n))
    assert abs(float((x * other).mean())) < 5 / math.sqrt(n)
    scaled = filled(n, dtype=torch.float64, seed=0, name="moments", std=0.02)
    assert torch.allclose(scaled, 0.02 * x, rtol=1e-15, atol=0)


def test_uniform_values_fill_the_open_interval() -> None:
    n = 1 << 20
    u = uniform(stream_key(0, "uniform"), torch.arange(n))
    counts = torch.histc(u, bins=64, min=0, max=1)
    chi_square = float(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)


def test_the_extreme_bits_give_finite_values(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([0, 2**63 - 1])
    monkeypatch.setattr(axonn.tensor.counter_random, "random_bits", lambda key, index: extremes)
    u = uniform(0, torch.arange(2))
    assert bool(((u > 0) & (u < 1)).all())
    assert bool(normal(0, torch.arange(2)).isfinite().all())


@pytest.mark.parametrize("tied", [False, True])
def test_every_cut_of_a_model_starts_from_the_same_weights(tied: bool) -> None:
    model = GPT(GPTConfig(name="t", layers=3, hidden=8, heads=2, seq_len=4, vocab=11, tied_head=tied))
    layers = len(model.layers)

    def weights(span: range, seed: int = 3) -> dict[str, torch.Tensor]:
        chunk = StageChunk(model, span, context=TensorContext.serial(), dtype=torch.float32, device=torch.device("cpu"))
        initialise(model, chunk, seed=seed)
        return dict(chunk.chain.named_parameters(remove_duplicate=False))

    whole = weights(range(layers))
    for span in [range(1), range(1, 3), range(4, layers), range(layers - 1, layers)]:
        for name, value in weights(span).items():
            assert torch.equal(value, whole[name]), name
    assert torch.equal(whole["embedding.tokens.weight"], whole["head.output.weight"]) == tied
    assert not torch.equal(weights(range(1), seed=4)["embedding.tokens.weight"], whole["embedding.tokens.weight"])
    norms = [name for name in whole if "norm" in name and name.endswith("weight")]
    assert norms
    assert all(torch.equal(whole[name], torch.ones(8)) for name in norms)
