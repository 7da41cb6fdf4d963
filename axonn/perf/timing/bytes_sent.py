"""Bytes that a rank sends per batch under a strategy, as records state them."""

from __future__ import annotations

from collections import Counter

from axonn.config.train_config import PrecisionConfig
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.strategy import Strategy
from axonn.perf.timing.communication import BYTES, Training


def bytes_by_axis(outline: ModelOutline, strategy: Strategy, *, batch_size: int) -> dict[str, int]:
    """Return the bytes by axis of the grid, for the rank that sends most along it.

    As in `axonn.observability.records.Record.bytes_per_batch`: the traffic of `axonn.perf.timing.communication` without
    what only our engine sends. Of a partitioned message (`Strategy.partition_messages`) a rank's shard counts along
    inter, and the all-gather of the shards along col.
    """
    grid = strategy.logical_grid
    layout = strategy.schedule.layout(grid.inter)
    training = Training(
        outline=outline,
        grid=grid,
        batch_size=batch_size,
        microbatch_size=strategy.microbatch_size,
        sub_shards=strategy.overdecomposition,
        layout=layout,
        spans=strategy.virtual_spans(outline),
        recompute=strategy.checkpoint_layers if strategy.recompute == "full" else None,
        precision=PrecisionConfig(compute=strategy.compute),
        optimizer=AdamWConfig(bsize=strategy.bsize, k=strategy.k),
    )
    ranks = [grid.rank(inter=stage) for stage in range(grid.inter)]
    parts = grid.col if strategy.partition_messages else 1
    received: Counter[int] = Counter()
    for rank in ranks:
        for message, count in training.messages(rank).items():
            received[message.peer] += count * message.elements
    most: dict[str, float] = {}
    for rank in ranks:
        sent = {axis: volume.bytes for axis, volume in training.volume(rank).items()}
        if parts > 1 and "inter" in sent:
            messages = sum(count * message.bytes for message, count in training.messages(rank).items())
            sent["inter"] -= messages * (parts - 1) / parts
            gathered = received[rank] * (parts - 1) / parts * BYTES[strategy.compute]
            sent["col"] = sent.get("col", 0.0) + gathered
        for axis, size in sent.items():
            most[axis] = max(most.get(axis, 0.0), size)
    return {axis: round(size) for axis, size in most.items()}
