"""Fields of a strategy that a framework is not told, since it does them in its own way."""

from __future__ import annotations

from collections.abc import Sequence

from axonn.perf.strategy import Strategy

OWN_WAY = (
    "order",
    "blocking_messages",
    "partition_messages",
    "partition",
    "overlap_input_gradients",
    "sequence_parallel",
    "overlap_reduction",
    "reduce_type",
    "optimizer_kernels",
    "agree_on_overflow",
    "accumulate",
)
"""How something is computed, beside what is computed and how the work is cut."""

OVERFLOW_AFTER = (
    "Its ranks agree on overflow after the reduction over the replicas; without agree_on_overflow: after the "
    "prediction has it before."
)
"""Note for frameworks whose ranks agree so, where the strategy leaves it open."""


def untold(strategy: Strategy, names: Sequence[str] = OWN_WAY) -> str:
    """A note for the launch of a framework that is told none of the fields `names`."""
    values = strategy.model_dump(mode="json", include=set(names))
    shown = ", ".join(f"{name} {' > '.join(values[name]) if name == 'order' else values[name]}" for name in names)
    return f"it is not told how to do these, and does them in its own way, whatever the strategy says: {shown}"
