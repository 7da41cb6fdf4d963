"""Mixed precision on a grid against a serial run of the same recipe, written in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from axonn.config import PrecisionConfig
from axonn.initial import fill
from axonn.tensor import TensorContext
from tests.comparing import part_of
from tests.rank_pool import RankPool
from tests.training import OPTIMIZER, Case, Outcome, batch_of, serial_model, train_in_process, train_over_mpi

# Half precision rounds sums over microbatches and rows in another order than over the whole batch. The loss falls from
# 4.1 to below 4 in the steps of a case.
LOSS_BOUND = {"bfloat16": 5e-3, "float16": 5e-4}
# Where a gradient is mostly rounding, Adam's step is its sign: masters differ more than losses.
MASTER_BOUND = {"bfloat16": 5e-2, "float16": 2e-2}
# Where layers are cut, sums over ranks round once more; 5.1e-2 and 2.6e-2 are seen.
CUT_MASTER_BOUND = {"bfloat16": 1e-1, "float16": 4e-2}
SCALE = 2.0**10


def serial_run(case: Case, *, lr: float = OPTIMIZER.lr) -> Outcome:
    """Half-precision weights and gradients, float32 loss, AdamW on float32 masters."""
    model, modules, named = serial_model(case)
    master = {name: torch.empty(p.shape) for name, p in named.items()}
    for name, parameter in master.items():
        fill(parameter, model.initial(name), name=name, seed=7)
        named[name].data.copy_(parameter)
    o = OPTIMIZER
    optimizer = torch.optim.AdamW(master.values(), lr=lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    outcome = Outcome()
    for step in range(case.steps):
        x, targets = batch_of(case, step)
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


def case_of(dtype: str, **changes: Any) -> Case:
    scale = 1.0 if dtype == "bfloat16" else SCALE
    precision = PrecisionConfig(compute=dtype, loss_scale=scale)  # type: ignore[arg-type]
    # Sizes that cannot be cut, unless a case changes them.
    case = Case(microbatches=4, steps=12, same_batch=True, dtype=dtype, precision=precision, heads=3, vocab=61)
    return replace(case, **changes)


def check(case: Case, outcomes: list[Outcome], reference: Outcome) -> None:
    bound = (MASTER_BOUND if case.grid.tensor == 1 else CUT_MASTER_BOUND)[case.dtype]
    for rank, outcome in enumerate(outcomes):
        assert outcome.losses == pytest.approx(reference.losses, rel=LOSS_BOUND[case.dtype], abs=0), rank
        for name, master in outcome.masters.items():
            assert master.dtype == torch.float32
            part = part_of(reference.parameters[name], outcome.placements[name], case, rank)
            error = float((master - part).norm() / part.norm())
            # A bias starts at zero and has moved by the sign of noisy gradients only.
            assert error < bound or name.endswith("bias"), f"{name} on rank {rank}: {error:.1e}"
            # The parameter itself is its rounded copy, bit for bit.
            assert torch.equal(outcome.parameters[name], master.to(getattr(torch, case.dtype))), name


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
def test_half_the_learning_rate_would_be_another_run(dtype: str) -> None:
    """The bound on the losses can tell recipes apart."""
    case = case_of(dtype)
    right, wrong = serial_run(case), serial_run(case, lr=OPTIMIZER.lr / 2)
    with pytest.raises(AssertionError):
        check(case, [replace(right, losses=wrong.losses)], right)


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
