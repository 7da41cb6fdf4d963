"""Lines that the training scripts of the Megatron family print, Megatron-LM's and Megatron-DeepSpeed's alike.

One line reports all of an iteration, in fields " key: value |": this format holds from Megatron-LM v2.0 to core 0.19
(`training_log` in megatron/training.py), in Megatron-DeepSpeed since 2021, and in BigScience's fork of it, which
reports seconds.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

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
    # The last of these stands behind all others that are needed: with it nothing is missing.
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
    found = _MEMORY.search(text)
    # Its MB are MiB.
    return None if found is None else round(float(found[1]) * 2**20)


def sizes_of(text: str) -> tuple[int, int] | None:
    """Return the tensor- and pipeline-parallel sizes that rank 0 prints at the start, or None."""
    found = _SIZES.search(text)
    return None if found is None else (int(found[1]), int(found[2]))


def parameters_of(text: str) -> tuple[tuple[int, int], int] | None:
    """Return (tensor rank, stage) and the number of parameters on it, or None."""
    found = _PARAMETERS.match(text)
    return None if found is None else ((int(found[1]), int(found[2])), int(found[3]))


def is_done(text: str) -> bool:
    """Return whether the run reports that it has come to its end."""
    return _DONE.match(text) is not None
