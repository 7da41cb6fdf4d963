"""The state of a small model as the engines of any grid would hold it, and checkpoints of it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from axonn.checkpoint.checkpoints import CheckpointState
from axonn.checkpoint.local_shard import LocalShard
from axonn.grid import ProcessGrid
from axonn.models.initialization import Normal, fill
from axonn.placement import Cut, Placement
from tests.helpers.shard_cases import Tensors

LAYERS = 4
PARAMETERS = LAYERS * (16 * 6 + 16 + 6 + 1) + 8 * 6


def state_of(batches: int, **changes: Any) -> CheckpointState:
    values = {"samples": 8 * batches, "seed": 3, "progress": {"updates": batches}, "config": {}, "grid": {}} | changes
    return CheckpointState(batches=batches, **values)


def placements_of(grid: ProcessGrid, stage: int) -> dict[str, Placement]:
    """What an engine would hold on a stage: its layers, the tied embedding on the first and the last stage."""

    def place(shape: tuple[int, ...], *cuts: Cut) -> Placement:
        return Placement(shape=shape, cuts=tuple(cut for cut in cuts if grid.extent(cut.axis) > 1))

    fused, features = Cut(0, "col", (4, 4, 8)), Cut(1, "row", (6,))
    found = {
        f"{kind}.block{i}.{name}": placement
        for i in range(LAYERS * stage // grid.inter, LAYERS * (stage + 1) // grid.inter)
        for name, placement in {
            "weight": place((16, 6), fused, features),
            "bias": place((16,), fused),
            "norm": place((6,), Cut(0, "row", (6,))),
            "scale": place(()),
        }.items()
        for kind in ("master", "exp_avg")
    }
    if stage in (0, grid.inter - 1):
        found["master.embedding.weight"] = place((8, 6), Cut(0, "col", (8,)), features)
    return found


def parts_of(grid: ProcessGrid, rank: int, *, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, LocalShard]:
    """What `rank` holds of the state, views of one flat buffer, as an optimizer's buckets are; zeros for seed 0."""
    here = grid.coordinates(rank)
    placements = placements_of(grid, here.inter)
    shapes = [placement.local_shape(grid) for placement in placements.values()]
    flat = torch.zeros(sum(prod(shape) for shape in shapes), dtype=dtype)
    views = [part.view(shape) for part, shape in zip(flat.split([prod(s) for s in shapes]), shapes, strict=True)]
    for (name, placement), view in zip(placements.items(), views, strict=True):
        if seed:
            fill(view, Normal(1.0), name=name, seed=seed, placement=placement, grid=grid, coordinates=here)
    return {n: LocalShard.placed(v, p, grid, here) for (n, p), v in zip(placements.items(), views, strict=True)}


def one_rank(seed: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, LocalShard]:
    return parts_of(ProcessGrid(), 0, seed=seed, dtype=dtype)


def same(a: Mapping[str, LocalShard], b: Mapping[str, LocalShard]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].tensor, b[name].tensor) for name in a)


def masters(parts: Mapping[str, LocalShard]) -> Tensors:
    """Those of one rank that holds everything, by the names of the parameters."""
    prefix = "master."
    return {n.removeprefix(prefix): p.tensor.clone() for n, p in parts.items() if n.startswith(prefix)}
