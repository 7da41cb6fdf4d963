"""The numeric tests are all on the list of `tests/helpers/isa.py`, and run under what it asks for."""

from __future__ import annotations

import os
import re

import pytest
import torch
from mpi4py import MPI

from tests.helpers.isa import INSTRUCTION_SETS, NUMERIC, ROOT, SHORT, SWITCHES, environment
from tests.helpers.rank_pool import RankPool
from tests.helpers.rounding import SIGMAS, bound, tightened, unit_roundoff

COMPARES = re.compile(
    r"^from tests\.helpers\.(comparing|tensor_layers|parallelizing|optimizer_cases|rounding) import"
    r"|\bassert_close\(|\ballclose\(",
    re.MULTILINE,
)
"""What a test uses that holds tensors against each other."""
ELSEWHERE = {
    "adding": "a layer of its own, compared once as an example",
    "baselines": "other frameworks, which have kernels of their own",
    "compare": "the same",
    "pytorch_data": "the same",
    "devices": "copies between devices",
    "gpu": "needs a GPU",
    "images": "decoding and scaling of files",
}
"""Tests that hold tensors against each other and are not on the list, and why."""


def test_every_numeric_test_is_on_the_list() -> None:
    files = {path.stem.removeprefix("test_"): path for path in (ROOT / "tests").rglob("test_*.py")}
    comparing = {name for name, path in files.items() if COMPARES.search(path.read_text(encoding="utf-8"))}
    missing = comparing - set(NUMERIC) - ELSEWHERE.keys()
    assert not missing, (
        f"add {sorted(missing)} to NUMERIC of tests/helpers/isa.py, or here to ELSEWHERE with the reason"
    )
    assert set(NUMERIC) <= files.keys()
    assert set(SHORT) <= set(NUMERIC)
    assert list(NUMERIC) == sorted(set(NUMERIC))
    assert not set(NUMERIC) & ELSEWHERE.keys()


def capability(comm: MPI.Intracomm) -> tuple[str, dict[str, str | None]]:
    """A job of the rank pool."""
    return torch.backends.cpu.get_cpu_capability(), {name: os.environ.get(name) for name in SWITCHES}


def test_ranks_compute_with_the_instructions_of_this_process(pool: RankPool) -> None:
    here = torch.backends.cpu.get_cpu_capability(), {name: os.environ.get(name) for name in SWITCHES}
    assert pool.run(capability, ranks=2) == [here, here]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_each_set_of_instructions_sets_every_switch(name: str) -> None:
    env = environment(name, {"PATH": "/bin", "ATEN_CPU_CAPABILITY": "other"})
    assert env["PATH"] == "/bin"
    assert [env[switch] for switch in SWITCHES] == list(INSTRUCTION_SETS[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_sums_stay_within_the_bound_and_faults_do_not(dtype: str) -> None:
    """Of 100 numbers, added one after the other in the type."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.rand(100, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))
    total = torch.zeros((), dtype=numbers.dtype)
    for number in numbers:
        total = total + number
    exact = numbers.double().sum()
    limit = SIGMAS * 10 * unit_roundoff(dtype)
    assert tightened(limit) == bound(dtype, 100)
    assert abs(float(total) / exact - 1) < limit
    assert abs(2 * float(total) / exact - 1) > limit
