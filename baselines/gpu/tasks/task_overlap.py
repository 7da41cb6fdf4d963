"""Task: share of the offloaded optimizer's copies between host and device that is hidden."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from axonn.config.train_config import TrainConfig, validate
from axonn.spans import COMPUTE, Span, SpanKind, SpanRecorder
from baselines.adapters.adapter_common import gpt_of
from baselines.gpu.tasks.task_common import engine_of, free_cache, timed_batches, tokens_of
from baselines.gpu.tasks.task_memory import QuickGPT

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


def batches_of(
    config: TrainConfig, device: torch.device, *, warmup: int, batches: int, deadline: float
) -> tuple[list[float], list[list[Span]]]:
    """Return the seconds and the spans of each batch after those that warm up, of at least two."""
    model = gpt_of(config)
    spans = SpanRecorder(0)
    engine = engine_of(QuickGPT(model), config, device, spans=spans)
    times, losses = timed_batches(
        lambda inputs, targets: engine.train_batch(inputs, targets).loss,
        lambda step: tokens_of(model, config.batch_size, step),
        device=device,
        warmup=warmup,
        batches=batches,
        deadline=deadline,
        least=2,
    )
    return times, [[s for s in spans.spans if s.step == step] for step in range(warmup, len(losses))]


def run(
    *, device: torch.device, seconds: float, config: Mapping[str, Any], warmup: int, batches: int
) -> dict[str, Any]:
    """Return medians over batches: `tail_s` by placement, `copies_s`, `under_spans_s`; and both shares."""
    wanted = validate(dict(config), TrainConfig, where="task")
    began = time.monotonic()
    medians: dict[str, Any] = {"tail_s": {}, "batch_s": {}}
    for number, placement in enumerate(PLACEMENTS):
        optimizer = wanted.optimizer.model_copy(update={"placement": placement})
        times, spans_of_batches = batches_of(
            wanted.model_copy(update={"optimizer": optimizer}),
            device,
            warmup=warmup,
            batches=batches,
            deadline=began + seconds * (number + 1) / len(PLACEMENTS),
        )
        medians["tail_s"][placement] = median(map(tail, spans_of_batches))
        medians["batch_s"][placement] = median(times)
        if placement == "offloaded":
            columns = zip(*map(covered, spans_of_batches), strict=True)
            medians["copies_s"], medians["under_spans_s"] = map(median, columns)
        free_cache(device)
    copies = medians["copies_s"]
    medians["hidden"] = hidden_share(
        copies_s=copies, offloaded_s=medians["tail_s"]["offloaded"], resident_s=medians["tail_s"]["device"]
    )
    medians["under_spans"] = medians["under_spans_s"] / copies if copies else 0.0
    return medians
