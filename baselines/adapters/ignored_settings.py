"""Fields of a strategy that a framework handles in its own way, whatever their values."""

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
"""Fields that say how something is computed, besides what is computed and how the work is cut."""

OVERFLOW_AFTER = (
    "Its ranks agree on overflow after the reduction over the replicas; without agree_on_overflow: after the "
    "prediction has it before."
)
"""Note for frameworks whose ranks agree on overflow this late, where the strategy leaves it open."""


def ignored_note(strategy: Strategy, names: Sequence[str] = OWN_WAY) -> str:
    """Return the note of a launch for a framework that ignores the fields `names`."""
    values = strategy.model_dump(mode="json", include=set(names))
    shown = ", ".join(f"{name} {' > '.join(values[name]) if name == 'order' else values[name]}" for name in names)
    return f"it is not told how to do these, and does them in its own way, whatever the strategy says: {shown}"
