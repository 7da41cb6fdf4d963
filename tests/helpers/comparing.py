"""Compares what every rank of a grid saw with the serial run, or with another run to the bit.

Errors are relative to the largest value of the tensor (gradients: of the layer), never elementwise. In float32 the
reference is the serial run in float32: it starts from the same rounded weights and computes the same function with
roundings of the same size, so the bound measures what the grid adds; against float64 it would measure float32 itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import pytest
import torch

from axonn.placement import Placement
from tests.helpers.rounding import bound, tightened
from tests.helpers.training import Case, Outcome, serial_reference

# In float64 far more than roundings explain: no fault is so small.
# In float32 a sum over the 160 tokens of four microbatches, whose terms went forwards and backwards through 13 links.
GRADIENT_BOUND = {"float64": tightened(1e-12), "float32": bound("float32", 160 * 26)}
# Adam's steps are relative to the gradient: errors of its small elements count as much as those of the large ones.
PARAMETER_BOUND = {"float64": tightened(1e-10), "float32": tightened(1e-3)}
# The gradient of the key bias is zero, since softmax does not see it: what is computed is rounding.
KEY_BIAS_BOUND = {"float64": tightened(1e-14), "float32": tightened(1e-6)}

Tensors = Mapping[str, torch.Tensor]


def check_every_rank(case: Case, outcomes: Sequence[Outcome]) -> None:
    """Compare each rank's own losses, and its parts of gradients and parameters, with the serial run's."""
    reference = serial_reference(case)
    assert len(outcomes) == case.grid.size
    for rank, outcome in enumerate(outcomes):
        assert outcome.losses == pytest.approx(reference.losses, rel=GRADIENT_BOUND[case.dtype], abs=0), rank
        assert outcome.evaluations == pytest.approx(reference.evaluations, rel=GRADIENT_BOUND[case.dtype], abs=0), rank
        assert len(outcome.losses) == len(outcome.gradients) == case.steps
        assert outcome.changed_by_evaluation == set(), rank
        assert all(outcome.applied), rank
        assert outcome.held == 0, rank
        if case.clip is not None:
            assert all(norm > case.clip for norm in reference.norms if norm is not None), "clipping is not tested"
            assert outcome.norms == pytest.approx(reference.norms, rel=GRADIENT_BOUND[case.dtype], abs=0), rank
        # With clipping the gradients that are left are scaled, or not; norms and parameters say what they were.
        for step in range(case.steps if case.clip is None else 0):
            check_gradients(case, rank, step, outcome, reference.gradients[step])
        check_parameters(case, rank, outcome, reference.parameters)
        assert outcome.gradients[-1].keys() == outcome.parameters.keys() == outcome.placements.keys()
    check_cover(case, outcomes, reference)


def check_gradients(case: Case, rank: int, step: int, outcome: Outcome, wholes: Tensors) -> None:
    """Compare the gradients that `rank` has in `step` with its parts of `wholes`."""
    largest_of: dict[str, float] = defaultdict(float)
    for name, gradient in wholes.items():
        layer = name.partition(".")[0]
        largest_of[layer] = max(largest_of[layer], largest(gradient))
    for name, gradient in outcome.gradients[step].items():
        value, key = key_part(name, gradient)
        reference, _ = key_part(name, part_of(wholes[name], outcome.placements[name], case, rank))
        assert value.shape == reference.shape, f"gradient of {name} on rank {rank}"
        error = largest(value - reference) / largest_of[name.partition(".")[0]]
        assert error <= GRADIENT_BOUND[case.dtype], f"gradient of {name} on rank {rank} in step {step}: {error:.1e}"
        assert key is None or largest(key) <= KEY_BIAS_BOUND[case.dtype], f"{name} on rank {rank} in step {step}"


def check_parameters(case: Case, rank: int, outcome: Outcome, wholes: Tensors) -> None:
    """Compare the parameters that `rank` has at the end with its parts of `wholes`."""
    for name, parameter in outcome.parameters.items():
        assert parameter.dtype == getattr(torch, case.dtype)
        value, key = key_part(name, parameter)
        reference, _ = key_part(name, part_of(wholes[name], outcome.placements[name], case, rank))
        assert value.shape == reference.shape, f"{name} on rank {rank}"
        error = largest(value - reference) / largest(key_part(name, wholes[name])[0])
        assert error <= PARAMETER_BOUND[case.dtype], f"{name} on rank {rank}: {error:.1e}"
        assert key is None or largest(key) <= KEY_BIAS_BOUND[case.dtype], f"{name} on rank {rank}"


def check_cover(case: Case, outcomes: Sequence[Outcome], reference: Outcome) -> None:
    """Every pipeline has every parameter once, and the ranks of a stage have all of it between them."""
    for group in case.grid.groups(["inter"]):
        owned = [name for rank in group for name in outcomes[rank].parameters]
        assert set(owned) == set(reference.parameters)
        # Only a tied weight lies on two stages, unless both ends of the network lie on one.
        twice = case.tied and case.inter > 1 and not (case.placement == "v" and case.chunks % 2 == 0)
        assert len(owned) - len(set(owned)) == (1 if twice else 0)
    for stage in case.grid.groups(["row", "col"]):
        for name, placement in outcomes[stage[0]].placements.items():
            holders = torch.zeros_like(reference.parameters[name], dtype=torch.int64)
            for rank in stage:
                assert outcomes[rank].placements[name] == placement, f"{name} on rank {rank}"
                for _, there in placement.pieces(case.grid, case.grid.coordinates(rank)):
                    holders[there] += 1
            assert len(holders.unique()) == 1, f"{name} on ranks {stage}"
            assert int(holders.max()) > 0, f"{name} on ranks {stage}"


def check_replicas(case: Case, outcomes: Sequence[Outcome]) -> None:
    """Ranks that hold the same part of a parameter have the same bits of it, and of its gradient."""
    for rank, outcome in enumerate(outcomes):
        for name, placement in outcome.placements.items():
            axes = [axis for axis in ("data", "row", "col") if axis not in placement.cut_axes]
            other = outcomes[case.grid.group(rank, axes)[0]]  # type: ignore[arg-type]
            for ours, theirs in [*zip(outcome.gradients, other.gradients, strict=True)]:
                assert torch.equal(ours[name], theirs[name]), f"gradient of {name} on rank {rank}"
            assert torch.equal(outcome.parameters[name], other.parameters[name]), f"{name} on rank {rank}"


def check_same_bits(one: Sequence[Outcome], other: Sequence[Outcome]) -> None:
    """Two runs of one case gave every rank the same."""
    for a, b in zip(one, other, strict=True):
        assert a.losses == b.losses
        assert a.evaluations == b.evaluations
        for ours, theirs in [*zip(a.gradients, b.gradients, strict=True), (a.parameters, b.parameters)]:
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def part_of(whole: torch.Tensor, placement: Placement, case: Case, rank: int) -> torch.Tensor:
    """What `rank` holds of a parameter, or of its gradient."""
    assert placement.shape == tuple(whole.shape)
    part = torch.full(placement.local_shape(case.grid), float("nan"), dtype=whole.dtype)
    for here, there in placement.pieces(case.grid, case.grid.coordinates(rank)):
        part[here] = whole[there]
    return part


def key_part(name: str, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tensor without its key bias, and the key bias (the middle third of a fused QKV bias) if it has one."""
    if not name.endswith((".qkv.bias", ".in_proj.bias")):
        return value, None
    query, key, values = value.chunk(3)
    return torch.cat([query, values]), key


def largest(value: torch.Tensor) -> float:
    return float(value.abs().max())
