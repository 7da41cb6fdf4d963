"""What follows from placements in a training: norms that count everything once, replicas that stay the same, memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from mpi4py import MPI

from axonn.checkpoint.local_shard import LocalShard
from axonn.config.train_config import PrecisionConfig
from axonn.distributed.runtime import connect
from axonn.distributed.transport import InProcessCollectives, InProcessWorld
from axonn.grid import Axis
from axonn.perf.timing.memory_model import model_state_bytes, state_bytes
from tests.helpers.rank_pool import RankPool
from tests.helpers.shard_cases import assembled, detached
from tests.helpers.training import BSIZE, Case, batch_of, make_engine, serial_reference, train_in_process

State = dict[str, LocalShard]
GRIDS: list[dict[str, Any]] = [
    {"row": 2},
    {"col": 2},
    {"row": 2, "col": 2},
    {"row": 3, "col": 4},
    {"data": 2, "row": 2},
    {"data": 2, "col": 2, "offloaded": True, "k": 1},
    {"inter": 2, "row": 2, "col": 2},
]
CUT_ALONG = {
    "tokens.weight": {"row", "col"},
    "positions.weight": {"row"},
    "norm.weight": {"row"},
    "norm.bias": {"row"},
    "qkv.weight": {"row", "col"},
    "qkv.bias": {"col"},
    "projection.weight": {"row", "col"},
    "projection.bias": {"row"},
    "fc1.weight": {"row", "col"},
    "fc1.bias": {"col"},
    "fc2.weight": {"row", "col"},
    "fc2.bias": {"row"},
    "output.weight": {"row", "col"},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_parameter_counts_once_in_the_norm(grid: dict[str, Any], tied: bool) -> None:
    case = Case(**grid, microbatches=2, steps=3, tied=tied, clip=0.1)
    expected = serial_reference(case).norms
    assert len(expected) == 3
    for outcome in train_in_process(case):
        assert outcome.norms == pytest.approx(expected, rel=1e-12, abs=0)


def states_of(comm: MPI.Intracomm, case: Case) -> list[State]:
    """A job of the rank pool: what the rank holds at the beginning and after each step."""
    with connect(case.grid, comm=comm) as runtime:
        engine = make_engine(case, runtime.rank, runtime.transport, runtime.collectives)
        rows = engine.shard(0)
        states = [detached(engine.state_tensors())]
        for step in range(case.steps):
            engine.train_batch(*(t[rows.start : rows.stop] for t in batch_of(case, step)))
            states.append(detached(engine.state_tensors()))
        return states


def pairs_along(case: Case, axis: Axis) -> list[tuple[int, int]]:
    """Ranks that differ along `axis` alone."""
    return [(a, b) for group in case.grid.groups([axis]) for a in group for b in group if a < b]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replicas_along_row_and_col_keep_the_same_bits_and_parts_differ(pool: RankPool, dtype: Any) -> None:
    """With sub-shards, and with rounding that shows every other order of additions."""
    case = Case(data=2, row=2, col=2, microbatches=3, steps=4, precision=PrecisionConfig(compute=dtype), clip=0.5)
    by_rank = pool.run(states_of, case, ranks=8)
    for step in range(case.steps + 1):
        states = [states[step] for states in by_rank]
        assembled(states)
        repeated: Counter[str] = Counter()
        for axis in ("row", "col"):
            for a, b in pairs_along(case, axis):
                for name in states[a]:
                    cut = axis in CUT_ALONG[parameter_of(name)]
                    here, there = states[a][name], states[b][name]
                    same_place = here.pieces == there.pieces
                    assert same_place is not cut, name
                    if not cut:
                        repeated[axis] += 1
                        assert torch.equal(here.tensor, there.tensor)
                    elif step:
                        assert not torch.equal(here.tensor, there.tensor), f"{name} along {axis}"
        assert repeated["row"] > 0
        assert repeated["col"] > 0


def parameter_of(name: str) -> str:
    """ "qkv.weight" of "exp_avg.attention3.qkv.weight"."""
    return ".".join(name.split(".")[2:])


@pytest.mark.parametrize("row", [1, 2, 3])
@pytest.mark.parametrize("col", [1, 2, 4])
def test_a_rank_of_a_gpt_holds_just_its_parts(row: int, col: int) -> None:
    """With the state offloaded 4 bytes for each of its own parameters, by the table of the layouts, and the buckets."""
    plain = Case(row=row, col=col, precision=PrecisionConfig(compute="bfloat16"))
    model = plain.model
    h, both = model.hidden, row * col
    layer = 12 * h * h // both + (3 + 4) * h // col + (1 + 1 + 4) * h // row
    phi = model.layers * layer + 2 * model.vocab * h // both + (model.seq_len + 2) * h // row
    if both == 1:
        assert phi == model.parameters
    for case in (plain, replace(plain, offloaded=True)):
        world = InProcessWorld(case.grid.size)

        def held(rank: int, case: Case = case, world: InProcessWorld = world) -> dict[str, int]:
            return make_engine(case, rank, None, InProcessCollectives(world, case.grid, rank)).memory()

        for memory in world.run(held):
            on_device = sum(memory[kind] for kind in ("parameters", "gradients", "optimizer_state", "buckets"))
            if case.offloaded:
                assert (memory["parameters"], memory["gradients"]) == (2 * phi, 2 * phi)
                assert on_device == 4 * phi + 16 * 2 * min(BSIZE, phi)
                assert memory["host"] == state_bytes("float16").streamed * phi
            else:
                assert on_device == model_state_bytes(phi) == 20 * phi
                assert memory["host"] == 0
