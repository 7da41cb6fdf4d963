"""Mixed precision on a grid against a serial run of the same recipe, written in plain PyTorch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch

from axonn.config.train_config import PrecisionConfig
from axonn.models.initialization import fill
from axonn.placement import Placement
from axonn.tensor import TensorContext
from tests.helpers.comparing import part_of
from tests.helpers.rank_pool import RankPool
from tests.helpers.rounding import bound
from tests.helpers.training import OPTIMIZER, Case, Outcome, batch_of, serial_model, train_in_process, train_over_mpi

# Adam's step is the sign of a gradient that is far above eps, and where a gradient is mostly rounding, its sign is that
# of the processor's roundings. Far below eps the step is proportional to the gradient, and so is what rounding does to
# it.
PROPORTIONAL = OPTIMIZER.model_copy(update={"lr": 2.0, "eps": 1.0, "weight_decay": 1e-3})
ROUNDINGS = 6 * 12
"""Six results in a half type (norm, product, GELU or attention, product, bias, sum) in each of twelve branches."""
SCALE = 2.0**10


def loss_bound(case: Case) -> float:
    """Of a mean over tokens, whose roundings are not the same."""
    return bound(case.dtype, ROUNDINGS) / (case.batch * 10) ** 0.5


def update_bound(case: Case) -> float:
    """Of what a weight has moved: forward and back again. 0.19 in bfloat16, 0.023 in float16; at most 0.024 and
    0.0052 were seen under the instruction sets of tests/helpers/isa.py."""
    return bound(case.dtype, 2 * ROUNDINGS)


def serial_run(case: Case, *, share: float = 1.0, rows: int | None = None) -> Outcome:
    """Half-precision weights and gradients, float32 loss, AdamW on float32 masters.

    Steps of a `share` of the learning rate, or with only the first `rows` of each batch, are those of another recipe.
    """
    model, modules, named = serial_model(case)
    master = initial_masters(case)
    for name, parameter in master.items():
        named[name].data.copy_(parameter)
    o = case.optimizer
    optimizer = torch.optim.AdamW(
        master.values(), lr=o.lr * share, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
    )
    outcome = Outcome()
    for step in range(case.steps):
        x, targets = (tensor[:rows] for tensor in batch_of(case, step))
        for module in modules.values():
            module.zero_grad()
            x = module(x)
        loss = model.loss(x, targets, TensorContext.serial())
        (loss * SCALE).backward()
        for name, parameter in named.items():
            assert parameter.grad is not None
            master[name].grad = parameter.grad.float() / SCALE
        optimizer.step()
        for name, parameter in named.items():
            parameter.data.copy_(master[name])
        outcome.losses.append(loss.item())
    outcome.parameters = master
    return outcome


def initial_masters(case: Case) -> dict[str, torch.Tensor]:
    model, _, named = serial_model(case)
    masters = {name: torch.empty(p.shape) for name, p in named.items()}
    for name, master in masters.items():
        fill(master, model.initial(name), name=name, seed=7)
    return masters


def case_of(dtype: str, **changes: Any) -> Case:
    scale = 1.0 if dtype == "bfloat16" else SCALE
    precision = PrecisionConfig(compute=dtype, loss_scale=scale)  # type: ignore[arg-type]
    # Sizes that cannot be cut, unless a case changes them.
    case = Case(microbatches=4, steps=6, same_batch=True, dtype=dtype, precision=precision, heads=3, vocab=61)
    return replace(case, optimizer=PROPORTIONAL, **changes)


def check_losses(case: Case, outcomes: list[Outcome], reference: Outcome) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.losses == pytest.approx(reference.losses, rel=loss_bound(case), abs=0), rank


def check_masters(case: Case, outcomes: list[Outcome], reference: Outcome) -> None:
    """Compare how far every master has moved, relative to the farthest of its layer."""
    farthest: dict[str, float] = defaultdict(float)
    for name, before in initial_masters(case).items():
        layer = name.partition(".")[0]
        farthest[layer] = max(farthest[layer], float((reference.parameters[name] - before).abs().max()))
    for rank, outcome in enumerate(outcomes):
        for name, master in outcome.masters.items():
            assert master.dtype == torch.float32
            part = part_of(reference.parameters[name], outcome.placements[name], case, rank)
            error = float((master - part).abs().max()) / farthest[name.partition(".")[0]]
            assert error < update_bound(case), f"{name} on rank {rank}: {error:.1e}"
            # The parameter itself is its rounded copy, bit for bit.
            assert torch.equal(outcome.parameters[name], master.to(getattr(torch, case.dtype))), name


def check(case: Case, outcomes: list[Outcome], reference: Outcome) -> None:
    check_losses(case, outcomes, reference)
    check_masters(case, outcomes, reference)


VARIANTS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "2 x 2, tied, offloaded": {"data": 2, "inter": 2, "tied": True, "offloaded": True},
    "1 x 4, zero-bubble V": {"inter": 4, "schedule": "zero-bubble", "chunks": 2, "placement": "v"},
    "row 2 x col 2": {"row": 2, "col": 2, "heads": 4, "vocab": 60},
    "4 x 2, recompute, k = 1": {"data": 4, "inter": 2, "recompute": 1, "k": 1},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_trains_like_the_serial_recipe(dtype: str, variant: str, pool: RankPool) -> None:
    case = case_of(dtype, **VARIANTS[variant])
    check(case, pool.run(train_over_mpi, case, ranks=case.grid.size), serial_run(case))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "other", [{"share": 0.5}, {"rows": 12}], ids=["half the learning rate", "a microbatch missing"]
)
def test_another_recipe_is_told_apart(dtype: str, other: dict[str, Any]) -> None:
    """By the losses, and by the masters alone."""
    case = case_of(dtype)
    right, wrong = serial_run(case), serial_run(case, **other)
    wrong.masters = wrong.parameters
    wrong.placements = {name: Placement(shape=tuple(master.shape)) for name, master in wrong.masters.items()}
    for compare in (check_losses, check_masters):
        with pytest.raises(AssertionError):
            compare(case, [wrong], right)


def test_gradients_can_accumulate_in_single_precision() -> None:
    precision = PrecisionConfig(compute="bfloat16", gradients="float32")
    case = case_of("bfloat16", data=2, inter=2, precision=precision)
    outcomes = train_in_process(case)
    check(case, outcomes, serial_run(case))
    assert all(g.dtype == torch.float32 for o in outcomes for g in o.gradients[-1].values())


def test_an_overflow_on_one_stage_skips_the_step_everywhere() -> None:
    """A dynamic scale far too large: every rank skips the same batches, then all train like the serial recipe."""
    precision = PrecisionConfig(compute="float16", loss_scale="dynamic")
    case = case_of("float16", data=2, inter=2, precision=precision, loss_scale=2.0**30, steps=20)
    outcomes = train_in_process(case)
    applied = [o.applied for o in outcomes]
    assert all(a == applied[0] for a in applied)
    assert not all(applied[0])
    assert any(applied[0])
    assert not applied[0][0]
    scales = outcomes[0].scales
    for i in range(case.steps - 1):
        assert scales[i + 1] == scales[i] / (1 if applied[0][i] else 2)
    for outcome in outcomes:
        assert outcome.scales == scales
        assert outcome.changed_by_skipped_steps == set()
