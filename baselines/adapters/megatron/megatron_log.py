"""Output of a Megatron-LM run, from version 2.0 (2021) to core 0.19 (2026)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from axonn.observability.records import Failure
from axonn.training.framework import PrintedRun
from axonn.training.supervision.log_failures import failure_of, lines_of
from baselines.adapters.iteration_lines import (
    Iteration,
    begins,
    is_done,
    iteration_of,
    memory_of,
    parameters_of,
    sizes_of,
)

_UNTIED = re.compile(r"^\s*untie_embeddings_and_output_weights \.+ True$")
"""Line of the list of all arguments, from 2022 on."""


@dataclass
class _Found:
    """State of a log after the lines read so far."""

    iterations: dict[int, Iteration] = field(default_factory=dict)
    """Iterations by number; of one that a run printed again, the last line."""
    memory: int | None = None
    sizes: tuple[int, int] | None = None
    """Tensor- and pipeline-parallel ranks."""
    own: dict[tuple[int, int], int] = field(default_factory=dict)
    """Parameters by tensor rank and stage."""
    untied: bool = False
    starts: set[int] = field(default_factory=set)
    """Numbers of the iterations with which the starts of the run began."""
    begins: bool = False
    """True when the next iteration is the first of a start."""
    done: bool = False

    def feed(self, text: str) -> None:
        """Read one line. Lines that are not understood, or not complete, are ignored."""
        if (iteration := iteration_of(text)) is not None:
            self.iterations[iteration.number] = iteration
            self.starts -= {iteration.number}
            self.starts |= {iteration.number} if self.begins else set()
            self.begins = False
        elif begins(text):
            self.begins = True
        elif (memory := memory_of(text)) is not None:
            self.memory = max(memory, self.memory or 0)
        elif (sizes := sizes_of(text)) is not None:
            self.sizes = sizes
        elif (own := parameters_of(text)) is not None:
            self.own[own[0]] = own[1]
        self.untied = self.untied or _UNTIED.match(text) is not None
        self.done = self.done or is_done(text)

    def parameters(self) -> int | None:
        """Return the number of parameters of the whole model where it is known: parameters that are replicated over
        tensor-parallel ranks are counted on each of them, and a tied head again on the last stage."""
        if self.sizes is None or self.sizes[0] > 1 or (self.sizes[1] > 1 and not self.untied):
            return None
        stages = [self.own.get((0, stage)) for stage in range(self.sizes[1])]
        known = [count for count in stages if count is not None]
        return sum(known) if len(known) == len(stages) else None

    def diverged(self) -> Failure | None:
        """Return a failure naming a step that was taken with a non-finite loss, or a run that never took one; or
        None."""
        bad = [i.number for i in self.iterations.values() if i.diverged]
        if bad:
            return Failure(cause="nan", detail=f"the loss of iteration {min(bad)} is no finite number")
        if self.done and self.iterations and all(i.loss is None for i in self.iterations.values()):
            return Failure(cause="nan", detail="every iteration was skipped: gradients overflowed")
        return None

    def at_last(self) -> bool:
        """Return whether the last iteration of the run is among those reported."""
        return any(i.number == i.last for i in self.iterations.values())


def read_log(lines: Iterable[str]) -> PrintedRun:
    """Parse the output of a run: of all ranks, possibly interleaved, prefixed or cut short.

    A run that was started several times yields the iterations of its starts one after the other. Seconds and losses are
    means over the iterations since the line before; an iteration that the loss scaler skipped has no loss. Memory is
    the peak that PyTorch allocated. An error after the run has reported its end is not a failure.
    """
    whole = list(lines)
    texts = [line.text for line in lines_of(whole)]
    # Nothing follows the number at the end of this line: cut, it would be another number.
    if texts and parameters_of(texts[-1]) is not None:
        texts.pop()
    found = _Found()
    for text in texts:
        found.feed(text)
    failure = found.diverged() or (None if found.done else failure_of(whole))
    ordered = [found.iterations[number] for number in sorted(found.iterations)]
    return PrintedRun(
        seconds=[i.seconds for i in ordered],
        starts=[place for place, i in enumerate(ordered) if i.number in found.starts],
        losses=[i.loss for i in ordered if i.loss is not None and math.isfinite(i.loss)],
        memory_bytes=found.memory,
        parameters=found.parameters(),
        finished=failure is None and (found.done or found.at_last()),
        failure=failure,
    )
