"""Lines that the training scripts of the Megatron family print, Megatron-LM's and Megatron-DeepSpeed's alike.

One line reports all of an iteration, in fields " key: value |": this format holds from Megatron-LM v2.0 to core 0.19
(`training_log` in megatron/training.py), in Megatron-DeepSpeed since 2021, and in BigScience's fork of it, which
reports seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from axonn.training.supervision.log_failures import lines_of

_START = re.compile(r"iteration +(\d+)/ *(\d+) \|")
_FIELD = re.compile(r" (?P<key>[^:|]+): +(?P<value>[-+.\w]+) $")
_SECONDS = {"elapsed time per iteration (ms)": 1e-3, "elapsed time per iteration (s)": 1.0}
_LOSSES = ("lm loss", "lm-loss")
_SKIPPED = "number of skipped iterations"
_NAN = "number of nan iterations"
_MEMORY = re.compile(r"iterations\) memory \(MB\) \| allocated: [\d.]+ \| max allocated: (\d+\.\d+) \| reserved: ")
_PARAMETERS = re.compile(
    r"^ *> number of parameters on \(tensor, pipeline\) model parallel rank \((\d+), (\d+)\): ?(\d+)$"
)
_SIZES = re.compile(r"tensor-model-parallel size: (\d+), pipeline-model-parallel size: (\d+)\b")
_BEGINS = re.compile(r"^ *training \.\.\.$")
_DONE = re.compile(r"^ *\[(after training is done|exiting program at iteration \d+)\] datetime: ")


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One iteration line; its values are means over the iterations since the line before."""

    number: int
    last: int
    """Number of the iteration with which the run ends."""
    seconds: float
    loss: float | None
    """None where it is not printed (all iterations were skipped) or is not a number."""
    skipped: int

    @property
    def diverged(self) -> bool:
        """True if the loss is not finite although the step was taken."""
        return not self.skipped and (self.loss is None or not math.isfinite(self.loss))


def iteration_of(text: str) -> Iteration | None:
    """Parse an iteration line.

    Returns None for any other line, for a line cut short, and for one with another line's text in its middle.
    """
    starts = list(_START.finditer(text))
    if not starts or not text.rstrip().endswith("|"):
        return None
    fields = {}
    for part in text[starts[-1].end() :].rstrip().split("|")[:-1]:
        if (field := _FIELD.match(part)) is None:
            return None
        fields[field["key"]] = field["value"]
    unit = next((key for key in _SECONDS if key in fields), None)
    # _NAN is the last of the fields that are needed: with it the line is complete.
    if unit is None or _SKIPPED not in fields or _NAN not in fields:
        return None
    loss = next((fields[key] for key in _LOSSES if key in fields), None)
    try:
        return Iteration(
            number=int(starts[-1][1]),
            last=int(starts[-1][2]),
            seconds=float(fields[unit]) * _SECONDS[unit],
            loss=None if loss is None else float(loss),
            skipped=int(fields[_SKIPPED]),
        )
    except ValueError:
        return None


def begins(text: str) -> bool:
    """Return whether rank 0 reports that a start of the run is about to train its first iteration."""
    return _BEGINS.match(text) is not None


def memory_of(text: str) -> int | None:
    """Return the peak of the allocated bytes from a rank's memory line, or None."""
    match = _MEMORY.search(text)
    # Its MB are MiB.
    return None if match is None else round(float(match[1]) * 2**20)


def sizes_of(text: str) -> tuple[int, int] | None:
    """Return the tensor- and pipeline-parallel sizes that rank 0 prints at the start, or None."""
    match = _SIZES.search(text)
    return None if match is None else (int(match[1]), int(match[2]))


def parameters_of(text: str) -> tuple[tuple[int, int], int] | None:
    """Return (tensor rank, stage) and the number of parameters on it, or None."""
    match = _PARAMETERS.match(text)
    return None if match is None else ((int(match[1]), int(match[2])), int(match[3]))


def is_done(text: str) -> bool:
    """Return whether the run reports that it has come to its end."""
    return _DONE.match(text) is not None


@dataclass
class IterationLog:
    """State of a log of the Megatron family after the lines read so far."""

    iterations: dict[int, Iteration] = field(default_factory=dict)
    """Iterations by number; of one that a run printed again, the last line."""
    memory: int | None = None
    """Peak of the allocated bytes over the ranks."""
    sizes: tuple[int, int] | None = None
    """Tensor- and pipeline-parallel ranks."""
    rank_parameters: dict[tuple[int, int], int] = field(default_factory=dict)
    """Parameters by tensor rank and stage."""
    starts: set[int] = field(default_factory=set)
    """Numbers of the iterations with which the starts of the run began."""
    begins: bool = False
    """True when the next iteration is the first of a start."""
    done: bool = False
    """True once the training script has reported its end."""

    def read(self, lines: Iterable[str]) -> None:
        """Read the output of a run: of all ranks, possibly interleaved, prefixed or cut short."""
        texts = [line.text for line in lines_of(lines)]
        # The line ends with a number: cut short, it would report another one.
        if texts and parameters_of(texts[-1]) is not None:
            texts.pop()
        for text in texts:
            self.feed(text)

    def feed(self, text: str) -> bool:
        """Read one line and return whether it reports a value."""
        self.done = self.done or is_done(text)
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
        elif (parameters := parameters_of(text)) is not None:
            self.rank_parameters[parameters[0]] = parameters[1]
        else:
            return False
        return True

    def first_lines(self) -> list[int]:
        """Return the places of the starts' first iterations among all iterations in order."""
        return [place for place, number in enumerate(sorted(self.iterations)) if number in self.starts]

    def at_last(self) -> bool:
        """Return whether the last iteration of the run is among those reported."""
        return any(i.number == i.last for i in self.iterations.values())
