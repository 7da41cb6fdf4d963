"""The model optimizer of a single rank: against torch's, and placements, buckets and precisions against each other."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from axonn.config.train_config import LearningRateConfig, PrecisionConfig
from axonn.device.streams import Timeline
from axonn.distributed.collectives import (
    Call,
    CollectiveGroup,
    CollectiveHandle,
    Collectives,
    Operation,
    SerialCollectives,
)
from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.inter_layer.stage import ParameterSpec
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.optim.model_optimizer import ModelOptimizer
from axonn.perf.timing.memory_model import model_state_bytes, state_bytes
from axonn.placement import Placement
from axonn.spans import SpanKind
from tests.helpers.optimizer_cases import (
    CPU,
    PRECISIONS,
    SHAPES,
    Case,
    give_gradients,
    gradient,
    initialise,
    make_optimizer,
    optimize,
    random_value,
    reference,
    same_bits,
    specs_of,
)
from tests.helpers.shard_cases import detached, part_of

ELEMENTS = 35 + 3 + 1 + 41
cuts = st.fixed_dictionaries(
    {
        "bsize": st.sampled_from([1, 7, 16, 35, ELEMENTS - 1, ELEMENTS, 1000]),
        "k": st.sampled_from([None, 1, 2, 3, 100]),
        "buckets_resident": st.integers(1, 4),
        "clip_norm": st.sampled_from([None, 0.05, 1e6]),
    }
)


def simple_optimizer(specs: list[ParameterSpec], precision: PrecisionConfig, **options: Any) -> ModelOptimizer:
    return ModelOptimizer(
        specs,
        grid=ProcessGrid(),
        rank=0,
        collectives=SerialCollectives(ProcessGrid(), 0),
        config=AdamWConfig(**options),
        precision=precision,
        initialise=initialise,
        timeline=Timeline(CPU, None),
    )


def spec_of(name: str, *shape: int, dtype: torch.dtype = torch.float32, **more: Any) -> ParameterSpec:
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
    return ParameterSpec(name=name, parameter=parameter, placement=Placement(shape=shape), **more)


# --- what a step computes


@settings(max_examples=40)
@given(cut=cuts, placement=st.sampled_from(["device", "offloaded"]))
def test_a_step_is_that_of_torch_adamw_however_it_is_cut(cut: dict[str, Any], placement: str) -> None:
    case = Case(options=cut | {"placement": placement})
    expected = reference(case)
    outcome = optimize(case)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(outcome.parameters[-1][name], weight, rtol=0, atol=1e-12)
    for result, norm in zip(outcome.results, expected.norms, strict=True):
        assert result.applied
        assert result.learning_rate == case.config.lr
        assert result.gradient_norm == (None if cut["clip_norm"] is None else pytest.approx(norm, rel=1e-12))


@settings(max_examples=60)
@given(cut=cuts, precision=st.sampled_from(list(PRECISIONS)))
def test_offloaded_state_gives_the_same_bits(cut: dict[str, Any], precision: str) -> None:
    plain = Case(precision=precision, steps=6, options=cut)
    offloaded = replace(plain, options=cut | {"placement": "offloaded"})
    a, b = optimize(plain), optimize(offloaded)
    assert a.results == b.results
    for step in range(plain.steps):
        assert same_bits(a.states[step], b.states[step])
        assert same_bits(a.parameters[step], b.parameters[step])


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "float64"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_masters_follow_the_descaled_gradients_and_parameters_the_masters(precision: str, clip: float | None) -> None:
    case = Case(precision=precision, options={"clip_norm": clip})
    outcome = optimize(case)
    config = PrecisionConfig(**PRECISIONS[precision])
    compute, kept, master = (getattr(torch, t) for t in (config.compute, config.gradient_type, config.master_type))
    weights = {f"stage0.{n}": random_value(s, "weight", f"stage0.{n}").to(master, copy=True) for n, s in SHAPES.items()}
    parameters = {name: nn.Parameter(weight) for name, weight in weights.items()}
    serial = torch.optim.AdamW(parameters.values(), lr=2e-3, betas=(0.85, 0.98), eps=1e-7, weight_decay=0.05)
    for step, result in enumerate(outcome.results):
        assert result.applied
        for name, parameter in parameters.items():
            value = gradient(name, tuple(parameter.shape), step, 0, 0)
            parameter.grad = (value * result.loss_scale).to(kept).to(master) / result.loss_scale
        norm = nn.utils.clip_grad_norm_(parameters.values(), float("inf") if clip is None else clip)
        assert (
            result.gradient_norm is None if clip is None else result.gradient_norm == pytest.approx(float(norm), 1e-5)
        )
        serial.step()
    for name, parameter in parameters.items():
        found = outcome.states[-1][f"master.{name}"]
        assert found.dtype == master
        torch.testing.assert_close(found, parameter.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(outcome.parameters[-1][name], found.to(compute))


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("placement", ["device", "offloaded"])
def test_masters_keep_updates_that_a_half_type_would_lose(half: str, placement: str) -> None:
    spec = spec_of("weight", 8, dtype=getattr(torch, half))
    precision = PrecisionConfig(compute=half)  # type: ignore[arg-type]
    optimizer = simple_optimizer([spec], precision, lr=2.0**-12, weight_decay=0.0, placement=placement)
    optimizer.state_tensors()["master.weight"].tensor.fill_(1.0)
    optimizer.state_loaded()
    assert torch.equal(spec.parameter.detach(), torch.ones(8, dtype=spec.parameter.dtype))
    for step in range(64):
        optimizer.zero()
        assert spec.parameter.grad is not None
        spec.parameter.grad.fill_(optimizer.loss_scale * 2.0**-8)
        optimizer.step(step)
    # Adam's step under a constant gradient is lr; alone, each would be rounded away.
    assert (torch.ones((), dtype=spec.parameter.dtype) - 2.0**-12).item() == 1.0
    torch.testing.assert_close(spec.parameter.detach().float(), torch.full((8,), 1 - 2.0**-6), rtol=0, atol=2.0**-9)


def test_gradients_of_microbatches_add_up_in_float32_when_asked() -> None:
    sums = {}
    for gradients in ("bfloat16", "float32"):
        spec = spec_of("weight", 4, dtype=torch.bfloat16)
        optimizer = simple_optimizer([spec], PrecisionConfig(compute="bfloat16", gradients=gradients))  # type: ignore[arg-type]
        for _ in range(2):
            optimizer.zero()
            for _ in range(1000):
                spec.parameter.sum().backward()
        optimizer.reduce()
        assert spec.parameter.grad is not None
        assert spec.parameter.grad.dtype == getattr(torch, gradients)
        sums[gradients] = spec.parameter.grad.tolist()
    assert sums == {"float32": [1000.0] * 4, "bfloat16": [256.0] * 4}


def test_the_learning_rate_of_the_batch_is_used() -> None:
    schedule = LearningRateConfig(name="linear", warmup=2, decay_until=4, final=0.5)
    case = Case(options={"schedule": schedule, "weight_decay": 0.0})
    optimizer, specs = make_optimizer(case)
    (spec,) = (s for s in specs if s.name.endswith("long"))
    for batch, share in ((1, 1.0), (0, 0.5), (3, 0.75), (9, 0.5)):
        before = spec.parameter.detach().clone()
        optimizer.state_tensors()["exp_avg.stage0.long"].tensor.zero_()
        optimizer.state_tensors()["exp_avg_sq.stage0.long"].tensor.zero_()
        optimizer.load_progress({"updates": 0, "loss_scale": 1.0, "good_steps": 0})
        give_gradients(optimizer, specs, case, 0, 0)
        assert optimizer.step(batch).learning_rate == pytest.approx(2e-3 * share)
        # Adam's first step is the rate itself, in the direction of the gradient.
        torch.testing.assert_close(
            (spec.parameter.detach() - before).abs(), torch.full_like(before, 2e-3 * share), rtol=1e-3, atol=0
        )


# --- parameters and gradients as views


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_parameters_stay_the_same_objects_in_one_buffer(precision: str, device: str) -> None:
    case = Case(precision=precision)
    module = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7))
    config = PrecisionConfig(**PRECISIONS[precision])
    dtype = getattr(torch, config.compute)
    module = module.to(device=device, dtype=dtype)
    objects = dict(module.named_parameters())
    specs = [ParameterSpec(name=n, parameter=p, placement=Placement(shape=tuple(p.shape))) for n, p in objects.items()]
    optimizer, _ = make_optimizer(case, specs=specs)
    storages = {p.untyped_storage().data_ptr() for p in objects.values()}
    assert len(storages) == 1
    assert len({p.grad.untyped_storage().data_ptr() for p in objects.values() if p.grad is not None}) == 1
    for name, parameter in module.named_parameters():
        assert parameter is objects[name]
        assert type(parameter) is nn.Parameter
        assert parameter.requires_grad
        assert torch.equal(parameter.detach(), random_value(tuple(parameter.shape), "weight", name).to(dtype))
    kept = {name: parameter.grad for name, parameter in objects.items()}
    module(torch.ones(2, 5, dtype=dtype)).square().sum().backward()
    for name, parameter in objects.items():
        assert parameter.grad is kept[name]
        assert parameter.grad is not None
        assert parameter.grad.dtype == getattr(torch, config.gradient_type)
        assert parameter.grad.any()
    optimizer.zero()
    assert not any(p.grad.any() for p in objects.values() if p.grad is not None)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("gradients", ["bfloat16", "float32"])
def test_shared_parameters_use_one_memory_and_their_gradients_add_up(device: str, gradients: Any) -> None:
    first, second, third = (nn.Parameter(torch.empty(3, 2, dtype=torch.bfloat16, device=device)) for _ in range(3))
    specs = [
        spec_of("other", 5, dtype=torch.bfloat16),
        ParameterSpec(name="shared", parameter=first, placement=Placement(shape=(3, 2)), shared_with=(second, third)),
    ]
    optimizer = simple_optimizer(specs, PrecisionConfig(compute="bfloat16", gradients=gradients), lr=0.5)
    for _ in range(2):
        optimizer.zero()
        (first.sum() + 2 * second.sum() + 4 * third.sum()).backward()
        assert second.grad is not None
        assert second.grad.tolist() == [[2.0, 2.0]] * 3
    optimizer.reduce()
    assert first.grad is not None
    assert first.grad.tolist() == [[7.0, 7.0]] * 3
    optimizer.zero()
    second.sum().backward()
    before = first.detach().clone()
    optimizer.step(0)
    assert (first < before).all()
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert first.data_ptr() == second.data_ptr() == third.data_ptr()


def test_reduce_undoes_the_loss_scale() -> None:
    for precision in PRECISIONS:
        case = Case(precision=precision)
        optimizer, specs = make_optimizer(case)
        give_gradients(optimizer, specs, case, 0, 0)
        optimizer.reduce()
        for spec in specs:
            assert spec.parameter.grad is not None
            expected = gradient(spec.name, tuple(spec.parameter.shape), 0, 0, 0)
            torch.testing.assert_close(spec.parameter.grad.double(), expected, rtol=1e-2, atol=1e-6)


def test_a_parameter_of_another_type_and_a_decay_without_an_end_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"'weight' is torch.float32.*bfloat16"):
        simple_optimizer([spec_of("weight", 2)], PrecisionConfig(compute="bfloat16"))
    with pytest.raises(ConfigError, match="decay_until"):
        simple_optimizer([], PrecisionConfig(), schedule=LearningRateConfig(name="cosine"))


@pytest.mark.parametrize("placement", ["device", "offloaded"])
def test_a_stage_without_parameters_has_nothing_to_do(placement: str) -> None:
    optimizer = simple_optimizer([], PrecisionConfig(compute="float16"), placement=placement, clip_norm=1.0)
    optimizer.zero()
    assert optimizer.step(0).applied
    assert optimizer.memory().device == 0


# --- overflow


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", ["float16", "float16, constant scale"])
@pytest.mark.parametrize("placement", ["device", "offloaded"])
def test_an_overflow_leaves_every_bit_as_it_was(value: float, precision: str, placement: str) -> None:
    case = Case(precision=precision, spike=(1, 0, value), options={"placement": placement})
    outcome = optimize(case)
    assert [result.applied for result in outcome.results] == [True, False, True, True]
    assert same_bits(outcome.states[0], outcome.states[1])
    assert same_bits(outcome.parameters[0], outcome.parameters[1])
    assert [progress["updates"] for progress in outcome.progress] == [1, 1, 2, 3]
    first = 64.0 if "constant" in precision else 2.0**16
    after = first if "constant" in precision else first / 2
    assert [result.loss_scale for result in outcome.results] == [first, first, after, after]
    assert not same_bits(outcome.parameters[1], outcome.parameters[2])


# --- memory


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(("bsize", "resident"), [(1, 1), (16, 1), (16, 2), (33, 3), (1000, 2)])
def test_model_state_is_what_the_memory_model_says_to_the_byte(half: str, bsize: int, resident: int) -> None:
    options = {"bsize": bsize, "buckets_resident": resident}
    plain = optimize(Case(precision=half, steps=1, options=options)).memory
    offloaded = optimize(Case(precision=half, steps=1, options=options | {"placement": "offloaded"})).memory
    assert plain is not None
    assert offloaded is not None
    assert plain.device == model_state_bytes(ELEMENTS) == 20 * ELEMENTS
    assert plain.host == plain.buckets == 0
    bucket = min(bsize, ELEMENTS)
    assert offloaded.device == model_state_bytes(ELEMENTS, optimizer="offloaded", bsize=bucket, buckets=resident)
    assert (offloaded.parameters, offloaded.gradients) == (2 * ELEMENTS, 2 * ELEMENTS)
    assert offloaded.buckets == 16 * resident * bucket
    assert offloaded.host == state_bytes("float16").streamed * ELEMENTS


@pytest.mark.parametrize(
    ("precision", "plain", "per_element", "per_bucket_element", "host"),
    [
        ("float32", 16, 8, 8, 8),
        ("float64", 32, 16, 16, 16),
        ("float32 over float64", 4 + 4 + 24 + 8, 8, 32, 24),
        ("bfloat16 over float32", 2 + 4 + 12, 6, 12, 12),
    ],
)
def test_memory_of_other_precisions(
    precision: str, plain: int, per_element: int, per_bucket_element: int, host: int
) -> None:
    """No copies where a type need not be converted."""
    found = optimize(Case(precision=precision, steps=1)).memory
    offloaded = optimize(Case(precision=precision, steps=1, options={"placement": "offloaded"})).memory
    assert found is not None
    assert offloaded is not None
    assert found.device == plain * ELEMENTS
    assert offloaded.device == per_element * ELEMENTS + per_bucket_element * 2 * 16
    assert offloaded.host == host * ELEMENTS


# --- checkpoints


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("placements", [("device", "offloaded"), ("offloaded", "device")])
def test_the_state_goes_over_to_another_optimizer_bit_for_bit(precision: str, placements: tuple[str, str]) -> None:
    before, after = (
        Case(precision=precision, steps=5, spike=(1, 0, float("nan")), options={"placement": p, "clip_norm": 0.05})
        for p in placements
    )
    whole = optimize(before)
    first, specs = make_optimizer(before)
    for step in range(3):
        give_gradients(first, specs, before, 0, step)
        first.step(step)
    second, specs = make_optimizer(after)
    saved = detached(first.state_tensors())
    for name, part in second.state_tensors().items():
        part.tensor.copy_(saved[name].tensor)
    second.state_loaded()
    second.load_progress(first.progress())
    assert second.progress() == first.progress()
    for step in range(3, 5):
        give_gradients(second, specs, after, 0, step)
        assert second.step(step).loss_scale == whole.results[step].loss_scale
        state = {name: part.tensor for name, part in second.state_tensors().items()}
        assert same_bits(state, whole.states[step])
        assert same_bits({s.name: s.parameter.detach() for s in specs}, whole.parameters[step])


@pytest.mark.parametrize("placement", ["device", "offloaded"])
def test_state_tensors_have_the_names_and_places_of_the_parameters(placement: str) -> None:
    case = Case(row=2, col=2, precision="bfloat16", options={"placement": placement})
    here = case.grid.coordinates(3)
    specs = specs_of(case, 3)
    optimizer, _ = make_optimizer(case, rank=3, specs=specs, collectives=Elsewhere(case.grid, 3))
    state = optimizer.state_tensors()
    assert state.keys() == {f"{kind}.{s.name}" for kind in ("master", "exp_avg", "exp_avg_sq") for s in specs}
    for spec in specs:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            part = state[f"{kind}.{spec.name}"]
            assert part.tensor.dtype == torch.float32
            assert part.tensor.shape == spec.parameter.shape
            assert part.shape == spec.placement.shape
            assert list(part.pieces) == spec.placement.pieces(case.grid, here)
        expected = part_of(random_value(spec.placement.shape, "weight", spec.name), spec.placement, case.grid, here)
        assert torch.equal(state[f"master.{spec.name}"].tensor, expected.float())


class Elsewhere(SerialCollectives):
    """For a rank of a larger grid that reduces nothing."""


def test_incomplete_progress_is_an_error() -> None:
    optimizer, _ = make_optimizer(Case())
    with pytest.raises(ConfigError, match="good_steps, loss_scale"):
        optimizer.load_progress({"updates": 3})


# --- order of work


class Watched(Collectives):
    """Two ranks that have the same gradients, of which this is one. Notes what is updated when a result is awaited."""

    def __init__(self, grid: ProcessGrid) -> None:
        super().__init__(grid, 0)
        self.specs: list[ParameterSpec] = []
        self.start: dict[str, torch.Tensor] = {}
        self.seen: list[tuple[int, int, set[str]]] = []
        """(which chunk is awaited, chunks started by then, parameters that have changed by then)"""

    def _group(self, ranks: tuple[int, ...], axes: Any) -> None:
        return None

    def _all_reduce(self, tensor: torch.Tensor, group: CollectiveGroup, operation: Operation) -> CollectiveHandle:
        return _WatchedWork(self, tensor, self.calls.total() - 1)

    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: CollectiveGroup) -> CollectiveHandle:
        raise AssertionError("an optimizer gathers nothing")


class _WatchedWork(CollectiveHandle):
    def __init__(self, owner: Watched, tensor: torch.Tensor, number: int) -> None:
        self._owner, self._tensor, self._number = owner, tensor, number

    def wait(self) -> None:
        owner = self._owner
        changed = {s.name for s in owner.specs if not torch.equal(s.parameter, owner.start[s.name])}
        owner.seen.append((self._number, owner.calls.total(), changed))
        self._tensor.mul_(2)


@pytest.mark.parametrize("placement", ["device", "offloaded"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_chunk_is_updated_while_the_next_are_reduced_unless_the_norm_is_needed(
    placement: str, clip: float | None
) -> None:
    case = Case(data=2, options={"placement": placement, "clip_norm": clip, "bsize": 10, "k": 1})
    collectives = Watched(case.grid)
    specs = [spec_of(name, 10, dtype=torch.float64) for name in "abcd"]
    optimizer, _ = make_optimizer(case, collectives=collectives, specs=specs)
    collectives.specs = specs
    collectives.start = {s.name: s.parameter.detach().clone() for s in specs}
    give_gradients(optimizer, specs, case, 0, 0)
    optimizer.step(0)
    done = [set("abcd"[:i]) if clip is None else set() for i in range(4)]
    assert collectives.seen == [(i, 4, done[i]) for i in range(4)]
    assert collectives.calls == {Call("all-reduce sum", ("data",), (0, 1), 10, "float64", 8): 4}


@pytest.mark.parametrize(
    ("k", "options", "expected"),
    [
        (2, {}, {SpanKind.OPTIMIZER: 3}),
        (None, {}, {SpanKind.OPTIMIZER: 1}),
        (2, {"placement": "offloaded"}, {SpanKind.OPTIMIZER: 3, SpanKind.COPY: 2 * 5}),
    ],
)
def test_spans_of_a_step(k: int | None, options: dict[str, Any], expected: dict[SpanKind, int]) -> None:
    case = Case(steps=2, options=options | {"bsize": 16, "k": k})
    spans = optimize(case).spans
    for step in range(2):
        mine = [span for span in spans if span.step == step]
        assert {kind: sum(span.kind == kind for span in mine) for kind in {s.kind for s in mine}} == expected
        assert all(span.end >= span.start > 0 for span in mine)
        chunks = [span for span in mine if span.kind == SpanKind.OPTIMIZER]
        assert all(a.end <= b.start for a, b in pairwise(chunks))
