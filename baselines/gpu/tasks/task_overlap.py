"""Task: share of the offloaded optimizer's copies between host and device that is hidden."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from axonn.config.train_config import TrainConfig, validate
from axonn.spans import COMPUTE, Span, SpanKind, SpanRecorder
from baselines.gpu.peaks import wait_for
from baselines.gpu.tasks.task_memory import engine_of, tokens_of

PLACEMENTS = ("device", "offloaded")
Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same instants as intervals that do not touch, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > start:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Return the seconds that at least one of them covers."""
    return sum(end - start for start, end in union(intervals))


def of_kinds(spans: Sequence[Span], *kinds: SpanKind) -> list[Interval]:
    return [(s.start, s.end) for s in spans if s.kind in kinds]


def tail(spans: Sequence[Span]) -> float:
    """Return the seconds of one batch from the end of its last backward to that of the optimizer and its copies."""
    backward = [end for _, end in of_kinds(spans, *COMPUTE)]
    step = [end for _, end in of_kinds(spans, SpanKind.OPTIMIZER, SpanKind.COPY)]
    return max(step) - max(backward) if backward and step else 0.0


def covered(spans: Sequence[Span]) -> tuple[float, float]:
    """Return the seconds of copies in one batch, and how many of them lie under spans of compute or of the
    optimizer."""
    copies = of_kinds(spans, SpanKind.COPY)
    work = of_kinds(spans, *COMPUTE, SpanKind.OPTIMIZER)
    taken = length(copies)
    return taken, taken + length(work) - length(copies + work)


def hidden_share(*, copies_s: float, offloaded_s: float, resident_s: float) -> float:
    """Return the share of the copies' time that does not make the step longer than one without copies; 0 without
    copies."""
    if copies_s <= 0:
        return 0.0
    return min(1.0, max(0.0, 1.0 - max(0.0, offloaded_s - resident_s) / copies_s))


def run(
    *, device: torch.device, seconds: float, config: Mapping[str, Any], warmup: int, batches: int
) -> dict[str, Any]:
    """Return medians over batches: `tail_s` by placement, `copies_s`, `under_spans_s`; and both shares."""
    wanted = validate(dict(config), TrainConfig, where="task")
    began = time.monotonic()
    found: dict[str, Any] = {"tail_s": {}, "batch_s": {}}
    for number, placement in enumerate(PLACEMENTS):
        own = wanted.model_copy(update={"optimizer": wanted.optimizer.model_copy(update={"placement": placement})})
        spans = SpanRecorder(0)
        engine = engine_of(own, device, spans=spans)
        taken = []
        for step in range(warmup + batches):
            inputs, targets = tokens_of(own.model, own.batch_size, step)
            wait_for(device)
            start = time.perf_counter()
            engine.train_batch(inputs, targets)
            wait_for(device)
            taken.append(time.perf_counter() - start)
            if step > warmup and time.monotonic() - began > seconds * (number + 1) / len(PLACEMENTS):
                break
        steps = range(warmup, len(taken))
        each = [[s for s in spans.spans if s.step == step] for step in steps]
        found["tail_s"][placement] = median(tail(own) for own in each)
        found["batch_s"][placement] = median(taken[warmup:])
        if placement == "offloaded":
            pairs = [covered(own) for own in each]
            found["copies_s"], found["under_spans_s"] = (median(column) for column in zip(*pairs, strict=True))
        del engine, spans
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    copies = found["copies_s"]
    found["hidden"] = hidden_share(
        copies_s=copies, offloaded_s=found["tail_s"]["offloaded"], resident_s=found["tail_s"]["device"]
    )
    found["under_spans"] = found["under_spans_s"] / copies if copies else 0.0
    return found
