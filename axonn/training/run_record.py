"""The record of a run of this suite's own ranks, from its outcome and its spans, here or on a cluster."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from axonn.config.train_config import TrainConfig
from axonn.errors import RecordError
from axonn.observability.phases import phases
from axonn.observability.records import Execution, Failure, Record, Workload
from axonn.spans import Span, breakdown, overlap, read_spans, span_files
from axonn.training.framework import settings_ran
from axonn.training.provenance import fingerprint
from axonn.training.run_outcome import Outcome, steady


def run_record(
    config: TrainConfig, outcome: Outcome, *, folder: Path, warmup: int, ran: Execution, **said: Any
) -> Record:
    """The record of a run of `config` in `folder`; `said`: the fields that none of them knows.

    The rate is that of the published formula without recompute, whatever was recomputed.
    """
    found = measured_fields(config, outcome, folder=folder, warmup=warmup)
    asked = Workload.of(
        config.model, gpus=_ranks(config), batch_size=config.batch_size, precision=config.precision.compute
    )
    mean = found["batch_time_s"]
    return Record(
        kind="measured",
        asked=asked,
        ran=ran,
        settings=settings_ran(config, ran),
        tflops_formula=None if mean is None else config.model.flops_formula(recompute=False),
        tflops_per_gpu_without_recompute=None
        if mean is None
        else asked.flops(recompute=False) / mean / asked.gpus / 1e12,
        **found,
        **said,
    )


def measured_fields(config: TrainConfig, outcome: Outcome, *, folder: Path, warmup: int) -> dict[str, Any]:
    """What a record has of the run itself, by field."""
    said, done = outcome.failure, len(outcome.batch_times_s)
    if said is None and done < config.steps:
        said = Failure(cause="error", detail=f"{folder} has {done} of {config.steps} batches; run it again")
    mean, failure = time_or_failure(outcome.batch_times_s, said, warmup, outcome.new_starts)
    kept = [] if mean is None else steady(len(outcome.batch_times_s), warmup, outcome.new_starts)
    return {
        "batch_time_s": mean,
        "batch_times_s": outcome.batch_times_s,
        "warmup_batches": warmup,
        "losses": outcome.losses,
        "memory_bytes": outcome.memory_bytes,
        "failure": failure,
        "note": note_of(outcome.new_starts),
        **left_by_ranks(config, outcome, folder=folder, batches=kept),
    }


def time_or_failure(
    seconds: Sequence[float], failure: Failure | None, warmup: int, new_starts: Collection[int]
) -> tuple[float | None, Failure | None]:
    """The mean over the batches whose times count (`axonn.training.run_outcome.steady`), or why there is none."""
    kept = steady(len(seconds), warmup, new_starts)
    if failure is None and not kept:
        other = " and the first of each new start" if new_starts else ""
        failure = Failure(cause="error", detail=f"no batch but those that warm up: the first {warmup}{other}")
    return (sum(seconds[i] for i in kept) / len(kept) if failure is None else None), failure


def left_by_ranks(config: TrainConfig, outcome: Outcome, *, folder: Path, batches: Sequence[int]) -> dict[str, Any]:
    """What a record has of our own ranks beside times and losses, by field. `batches`: those that count."""
    return {
        **of_spans(spans_of_batches(folder, config, batches), batches),
        "memory_parts": outcome.memory_parts,
        "memory_of_all": outcome.memory_of_all,
        "bytes_per_batch": outcome.bytes_per_batch,
        "usage": outcome.usage,
        "configuration": configuration_of(config),
    }


def note_of(new_starts: Collection[int]) -> str | None:
    """What a reader has to know of a run that was started several times."""
    if not new_starts:
        return None
    numbers = ", ".join(str(step) for step in sorted(new_starts))
    return f"the run went on in new starts with batch {numbers} (counted from 0), whose times never count"


def spans_of(folder: Path, config: TrainConfig, *, first: int, last: int) -> list[Span]:
    """Spans of all ranks in the batches from `first` to before `last`; none where a rank took none."""
    return spans_of_batches(folder, config, range(first, last))


def spans_of_batches(folder: Path, config: TrainConfig, batches: Sequence[int]) -> list[Span]:
    """Spans of all ranks in these batches, which are in order; none where a rank took none."""
    if not batches:
        return []
    files = [span_files(folder / f"spans-{rank}.parquet", first_step=batches[0]) for rank in range(_ranks(config))]
    wanted = set(batches)
    return [s for own in files for file in own for s in read_spans(file) if s.step in wanted] if all(files) else []


def parts_of(folder: Path, config: TrainConfig, *, first: int, last: int) -> dict[str, float]:
    """Seconds of a batch by part, mean over ranks and over the batches from `first` to before `last`.

    Empty where a rank took no spans.
    """
    spans = spans_of(folder, config, first=first, last=last)
    return {name: value / (last - first) for name, value in breakdown(spans)._asdict().items()} if spans else {}


def of_spans(spans: Sequence[Span], batches: Sequence[int]) -> dict[str, dict[str, float]]:
    """What a record has of the spans of these batches, for one batch."""
    if not spans:
        return {"parts_s": {}, "phases_s": {}, "overlap_s": {}}
    # Between batches that do not follow each other there may be another start: that time is nobody's.
    windows = [breakdown(own)._asdict() for own in _windows(spans, batches)]
    found = {
        "parts_s": {name: sum(window[name] for window in windows) for name in windows[0]},
        "overlap_s": overlap(spans)._asdict(),
    }
    of_one = {name: {key: value / len(batches) for key, value in own.items()} for name, own in found.items()}
    return of_one | {"phases_s": phases(spans)._asdict()}


def _windows(spans: Sequence[Span], batches: Sequence[int]) -> Iterator[list[Span]]:
    """The spans of each sequence of batches without a gap."""
    for _, own in groupby(enumerate(batches), key=lambda pair: pair[1] - pair[0]):
        steps = {step for _, step in own}
        if inside := [s for s in spans if s.step in steps]:
            yield inside


def readable_spans(folder: Path, config: TrainConfig) -> str | None:
    """Why the spans of a run cannot be read, as those of ranks that were killed; None where they can."""
    try:
        for rank in range(_ranks(config)):
            for file in span_files(folder / f"spans-{rank}.parquet"):
                read_spans(file)
    except RecordError as error:
        return str(error)
    return None


def configuration_of(config: TrainConfig) -> str:
    """Hash of a configuration, for records."""
    return fingerprint(config.model_dump(mode="json"), [])


def measures(record: Record, config: TrainConfig) -> bool:
    """Whether a record is of a run of this very configuration."""
    return record.configuration == configuration_of(config)


def function_of(config: TrainConfig) -> str:
    """What is computed, however it is: runs with the same have the same losses."""
    plain = [v.model_dump(mode="json") for v in (config.model, config.data, config.precision)]
    own = config.optimizer.model_dump(mode="json", exclude={"placement", "bsize", "k", "buckets_resident"})
    return fingerprint([*plain, own, config.batch_size, config.seed], [])


def with_losses_compared(found: Sequence[tuple[str, Record]], tolerance: float) -> list[Record]:
    """Losses before times: of (function, record), a record whose losses differ by more than `tolerance` (relative) from
    the first of the same function is a failure instead."""
    reference: dict[str, Record] = {}
    compared = []
    for function, record in found:
        first = record if record.failure is not None else reference.setdefault(function, record)
        failure = None if record.failure is not None else _apart(first, record, tolerance)
        changed = record.model_copy(update={"batch_time_s": None, "failure": failure})
        compared.append(record if failure is None else changed)
    return compared


def _apart(first: Record, record: Record, tolerance: float) -> Failure | None:
    # Of no losses nobody knows whether they agree.
    worst = max((abs(a - b) / abs(a) for a, b in zip(first.losses, record.losses, strict=True)), default=math.inf)
    if worst <= tolerance:
        return None
    return Failure(
        cause="not-comparable",
        detail=f"losses differ from those of {first.ran.framework} ({first.point}) by {worst:.1e}, "
        f"more than {tolerance:.0e}",
    )


def _ranks(config: TrainConfig) -> int:
    return config.grid.size
