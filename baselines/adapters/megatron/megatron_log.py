"""Output of a Megatron-LM run, from version 2.0 (2021) to core 0.19 (2026)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from axonn.observability.records import Failure
from axonn.training.framework import PrintedRun
from axonn.training.supervision.log_failures import failure_of
from baselines.adapters.iteration_lines import IterationLog

_UNTIED = re.compile(r"^\s*untie_embeddings_and_output_weights \.+ True$")
"""Line of the list of all arguments, from 2022 on."""


@dataclass
class _MegatronLog(IterationLog):
    """State of a log after the lines read so far."""

    untied: bool = False
    """True once the list of arguments says that the head is not tied."""

    def feed(self, text: str) -> bool:
        self.untied = self.untied or _UNTIED.match(text) is not None
        return super().feed(text)

    def parameters(self) -> int | None:
        """Return the number of parameters of the whole model where it is known: parameters that are replicated over
        tensor-parallel ranks are counted on each of them, and a tied head again on the last stage."""
        if self.sizes is None or self.sizes[0] > 1 or (self.sizes[1] > 1 and not self.untied):
            return None
        stages = [self.rank_parameters.get((0, stage)) for stage in range(self.sizes[1])]
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


def read_log(lines: Iterable[str]) -> PrintedRun:
    """Parse the output of a run: of all ranks, possibly interleaved, prefixed or cut short.

    A run that was started several times yields the iterations of its starts one after the other. Seconds and losses are
    means over the iterations since the line before; an iteration that the loss scaler skipped has no loss. Memory is
    the peak that PyTorch allocated. An error after the run has reported its end is not a failure.
    """
    printed = list(lines)
    log = _MegatronLog()
    log.read(printed)
    failure = log.diverged() or (None if log.done else failure_of(printed))
    iterations = [log.iterations[number] for number in sorted(log.iterations)]
    return PrintedRun(
        seconds=[i.seconds for i in iterations],
        starts=log.first_lines(),
        losses=[i.loss for i in iterations if i.loss is not None and math.isfinite(i.loss)],
        memory_bytes=log.memory,
        parameters=log.parameters(),
        finished=failure is None and (log.done or log.at_last()),
        failure=failure,
    )
