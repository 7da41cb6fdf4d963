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

_NUMBER = r"([-+\d.einfa]+)"
# Of the pipeline engine; the time is the mean since the line before.
_STEPS = re.compile(
    rf"^steps: (\d+) loss: {_NUMBER} (?:[^:]+: \S+ )*iter time \(s\): (\d+\.\d{{3}}) samples/sec: \d+\.\d{{3}}$"
)
# Of the engine without a pipeline; the speed is that of the step before the line, of the whole job.
_SPEED = re.compile(
    rf"/global_step=(\d+), RunningAvgSamplesPerSec={_NUMBER}, CurrSamplesPerSec=(\d+\.\d+(?:e[-+]\d+)?), "
    r"MemAllocated=[\d.]+GB, MaxMemAllocated=(\d+\.\d+)GB$"
)
_PEAK = re.compile(r"^(?:\[.*:see_memory_usage\] )?MA [\d.]+ GB +Max_MA (\d+(?:\.\d+)?) GB +CA ")
_BATCH = re.compile(r"train_batch_size \.+ (\d+)$")
_UNIQUE = re.compile(r"\bUNIQUE_PARAMS=(\d+) \(\d")
_ENDED = re.compile(r"\[launch\.py:\d+:main\] Process \d+ exits successfully\.$")


@dataclass
class _Found:
    """State of a log after the lines read so far; each dictionary is keyed by the number of the iteration."""

    iterations: dict[int, Iteration] = field(default_factory=dict)
    steps: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Loss and seconds."""
    speeds: dict[int, float] = field(default_factory=dict)
    """Samples per second."""
    batch_size: int | None = None
    memory: int | None = None
    rough_memory: int | None = None
    """Peak rounded to 10 MiB."""
    unique: int | None = None
    sizes: tuple[int, int] | None = None
    own: dict[tuple[int, int], int] = field(default_factory=dict)
    """Parameters by tensor rank and stage."""
    starts: set[int] = field(default_factory=set)
    """Numbers of the iterations with which the starts of the run began."""
    begins: bool = False
    """True when the next iteration is the first of a start."""
    done: bool = False
    """True once the training script has reported its end."""
    ended: bool = False
    """True once the launcher has reported the end of a process."""

    def feed(self, text: str) -> None:
        """Read one line. Lines that are not understood are ignored."""
        if (iteration := iteration_of(text)) is not None:
            self.iterations[iteration.number] = iteration
            self.starts -= {iteration.number}
            self.starts |= {iteration.number} if self.begins else set()
            self.begins = False
        elif begins(text):
            self.begins = True
        elif (memory := memory_of(text)) is not None:
            self.memory = max(memory, self.memory or 0)
        elif (step := _STEPS.match(text)) is not None and (loss := _float(step[2])) is not None:
            self.steps[int(step[1])] = (loss, float(step[3]))
        elif (speed := _SPEED.search(text)) is not None:
            self.speeds[int(speed[1])] = float(speed[3])
            self.rough_memory = max(round(float(speed[4]) * 2**30), self.rough_memory or 0)
        elif (batch := _BATCH.search(text)) is not None:
            self.batch_size = int(batch[1])
        elif (unique := _UNIQUE.search(text)) is not None:
            self.unique = int(unique[1])
        elif (sizes := sizes_of(text)) is not None:
            self.sizes = sizes
        elif (own := parameters_of(text)) is not None:
            self.own[own[0]] = own[1]
        elif (peak := _PEAK.match(text)) is not None and (self.iterations or self.steps or self.speeds):
            # Each such line starts the peak anew, and those before the first iteration are of building the model.
            self.rough_memory = max(round(float(peak[1]) * 2**30), self.rough_memory or 0)
        elif is_done(text):
            self.done = True
        elif _ENDED.search(text) is not None:
            self.ended = True

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
        return self.own.get((0, 0)) if self.sizes == (1, 1) else self.unique

    def diverged(self) -> Failure | None:
        """Return a failure naming the first step that was taken with a non-finite loss, or None."""
        bad = [i.number for i in self.iterations.values() if i.diverged]
        bad += [number for number, (loss, _) in self.steps.items() if not math.isfinite(loss)]
        return Failure(cause="nan", detail=f"the loss of iteration {min(bad)} is no finite number") if bad else None

    def at_last(self) -> bool:
        """Return whether the last iteration of the run is among those reported."""
        return any(i.number == i.last for i in self.iterations.values())


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def printed_run(lines: Iterable[str]) -> PrintedRun:
    """Parse the output of a run: of all ranks, possibly interleaved, prefixed or cut short.

    A run that was started several times yields the iterations of its starts one after the other.
    """
    whole = list(lines)
    found = _Found()
    texts = [line.text for line in lines_of(whole)]
    # Nothing follows the number at the end of this line: cut, it would be another number.
    if texts and parameters_of(texts[-1]) is not None:
        texts.pop()
    for text in texts:
        found.feed(text)
    # What ranks say that lose each other at the end of a finished run is no failure of it.
    failure = found.diverged() or (None if found.done else failure_of(whole))
    return PrintedRun(
        seconds=found.seconds(),
        starts=[place for place, number in enumerate(sorted(found.iterations)) if number in found.starts],
        losses=found.losses(),
        memory_bytes=found.memory if found.memory is not None else found.rough_memory,
        parameters=found.parameters(),
        finished=found.done or (failure is None and (found.ended or found.at_last())),
        failure=failure,
    )
