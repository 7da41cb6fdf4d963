"""Output of a DeepSpeed run: Megatron-DeepSpeed's lines where there are any, otherwise those of DeepSpeed's engines.

Covers DeepSpeed from 0.3 to 0.19 (runtime/pipe/engine.py, utils/timer.py, launcher/launch.py); its ThroughputTimer
since 0.8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from axonn.observability.records import Failure
from axonn.training.framework import PrintedRun
from axonn.training.supervision.log_failures import failure_of
from baselines.adapters.iteration_lines import IterationLog

_NUMBER = r"([-+\d.einfa]+)"
# Line of the pipeline engine; its time is the mean since the line before.
_STEPS = re.compile(
    rf"^steps: (\d+) loss: {_NUMBER} (?:[^:]+: \S+ )*iter time \(s\): (\d+\.\d{{3}}) samples/sec: \d+\.\d{{3}}$"
)
# Line of the engine without a pipeline; its speed is the whole job's in the step before the line.
_SPEED = re.compile(
    rf"/global_step=(\d+), RunningAvgSamplesPerSec={_NUMBER}, CurrSamplesPerSec=(\d+\.\d+(?:e[-+]\d+)?), "
    r"MemAllocated=[\d.]+GB, MaxMemAllocated=(\d+\.\d+)GB$"
)
_PEAK = re.compile(r"^(?:\[.*:see_memory_usage\] )?MA [\d.]+ GB +Max_MA (\d+(?:\.\d+)?) GB +CA ")
_BATCH = re.compile(r"train_batch_size \.+ (\d+)$")
_UNIQUE = re.compile(r"\bUNIQUE_PARAMS=(\d+) \(\d")
_ENDED = re.compile(r"\[launch\.py:\d+:main\] Process \d+ exits successfully\.$")


@dataclass
class _DeepSpeedLog(IterationLog):
    """State of a log after the lines read so far; each dictionary is keyed by the number of the iteration."""

    steps: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Loss and seconds."""
    speeds: dict[int, float] = field(default_factory=dict)
    """Samples per second."""
    batch_size: int | None = None
    rough_memory: int | None = None
    """Peak rounded to 10 MiB."""
    unique: int | None = None
    """Parameters as DeepSpeed counts them."""
    ended: bool = False
    """True once the launcher has reported the end of a process."""

    def feed(self, text: str) -> bool:
        if super().feed(text):
            return True
        if (step := _STEPS.match(text)) is not None and (loss := _float(step[2])) is not None:
            self.steps[int(step[1])] = (loss, float(step[3]))
        elif (speed := _SPEED.search(text)) is not None:
            self.speeds[int(speed[1])] = float(speed[3])
            self.rough_memory = max(round(float(speed[4]) * 2**30), self.rough_memory or 0)
        elif (batch := _BATCH.search(text)) is not None:
            self.batch_size = int(batch[1])
        elif (unique := _UNIQUE.search(text)) is not None:
            self.unique = int(unique[1])
        elif (peak := _PEAK.match(text)) is not None and (self.iterations or self.steps or self.speeds):
            # Each such line resets the peak, and those before the first iteration belong to building the model.
            self.rough_memory = max(round(float(peak[1]) * 2**30), self.rough_memory or 0)
        elif _ENDED.search(text) is not None:
            self.ended = True
        else:
            return False
        return True

    def seconds(self) -> list[float]:
        """Return the seconds of each reported iteration, the first included.

        Without Megatron's lines and without a pipeline, DeepSpeed omits the first two iterations, and counts from the
        start of a forward pass to the end of the step.
        """
        if self.iterations:
            return [self.iterations[number].seconds for number in sorted(self.iterations)]
        if self.steps:
            return [self.steps[number][1] for number in sorted(self.steps)]
        return [self.batch_size / speed for speed in self.speeds.values() if self.batch_size and speed > 0]

    def losses(self) -> list[float]:
        """Return the losses that are printed and finite."""
        printed = (
            [i.loss for _, i in sorted(self.iterations.items()) if i.loss is not None]
            if self.iterations
            else [loss for _, (loss, _) in sorted(self.steps.items())]
        )
        return [loss for loss in printed if math.isfinite(loss)]

    def parameters(self) -> int | None:
        """Return the number of parameters of the whole model where it is known: DeepSpeed counts parameters that are
        replicated over tensor-parallel ranks once for each of them."""
        if self.sizes is not None and self.sizes[0] > 1:
            return None
        return self.rank_parameters.get((0, 0)) if self.sizes == (1, 1) else self.unique

    def diverged(self) -> Failure | None:
        """Return a failure naming the first step that was taken with a non-finite loss, or None."""
        bad = [i.number for i in self.iterations.values() if i.diverged]
        bad += [number for number, (loss, _) in self.steps.items() if not math.isfinite(loss)]
        return Failure(cause="nan", detail=f"the loss of iteration {min(bad)} is no finite number") if bad else None


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read_log(lines: Iterable[str]) -> PrintedRun:
    """Parse the output of a run: of all ranks, possibly interleaved, prefixed or cut short.

    A run that was started several times yields the iterations of its starts one after the other.
    """
    printed = list(lines)
    log = _DeepSpeedLog()
    log.read(printed)
    # Ranks that lose each other after the end of a finished run are not a failure of it.
    failure = log.diverged() or (None if log.done else failure_of(printed))
    return PrintedRun(
        seconds=log.seconds(),
        starts=log.first_lines(),
        losses=log.losses(),
        memory_bytes=log.memory if log.memory is not None else log.rough_memory,
        parameters=log.parameters(),
        finished=log.done or (failure is None and (log.ended or log.at_last())),
        failure=failure,
    )
