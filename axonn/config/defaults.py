"""Choices of the engine for what a configuration leaves open; plain arithmetic, so that plans choose the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from axonn.errors import GridError
from axonn.grid import ProcessGrid


def sub_shards(overdecomposition: int | None, *, microbatch_size: int, grid: ProcessGrid) -> int:
    """Return the number of sub-shards of a microbatch: `overdecomposition`, by default 2 where possible and useful.

    Raises `GridError` when a microbatch has fewer rows than sub-shards.
    """
    if overdecomposition is None:
        return 2 if grid.tensor > 1 and microbatch_size > 1 else 1
    if not 1 <= overdecomposition <= microbatch_size:
        raise GridError(
            f"overdecomposition {overdecomposition} cuts a microbatch into more sub-shards than its {microbatch_size} "
            "rows (microbatch_size); lower the one or raise the other"
        )
    return overdecomposition


def default_checkpoint_blocks(blocks: int, *, limit: int, chunks: int = 1) -> int:
    """Return the blocks per checkpoint that need the least memory.

    `blocks`: blocks of one chunk; `chunks`: chunks of that size on a stage. With `limit` microbatches in flight a stage
    of n blocks keeps limit x n / ac inputs and recomputes ac blocks at once: least at ac = sqrt(limit n), which is
    sqrt(N) for N blocks in the network at the published limit, one microbatch per stage (Singh & Bhatele, IPDPS 2022,
    section V-C). The divisor of `blocks` nearest to that is taken.
    """
    best = math.sqrt(limit * blocks * chunks)
    return min((d for d in range(1, blocks + 1) if blocks % d == 0), key=lambda d: (abs(d - best), d), default=1)


def checkpoint_blocks(
    asked: int | Literal["auto"] | None, blocks: Sequence[int | None], *, limit: int, chunks: int
) -> int | None:
    """Return the blocks per checkpoint of a chunk of layers; None where nothing is recomputed.

    `asked`: `TrainConfig.activation_checkpointing`. `blocks`: the block of each layer. `limit`: microbatches in flight
    on a stage of `chunks` chunks.
    """
    if asked != "auto":
        return asked
    return default_checkpoint_blocks(len(set(blocks) - {None}), limit=-(-limit // chunks), chunks=chunks)
