"""Record of a run of this suite's own ranks, from its outcome and its spans, on this machine or on a cluster."""

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
    config: TrainConfig, outcome: Outcome, *, folder: Path, warmup: int, ran: Execution, **fields: Any
) -> Record:
    """Return the record of a run of `config` in `folder`; `fields`: the fields that follow from none of these.

    The rate is that of the published formula without recompute, whatever was recomputed.
    """
    measured = measured_fields(config, outcome, folder=folder, warmup=warmup)
    asked = Workload.of(
        config.model, gpus=_ranks(config), batch_size=config.batch_size, precision=config.precision.compute
    )
    mean = measured["batch_time_s"]
    return Record(
        kind="measured",
        asked=asked,
        ran=ran,
        settings=settings_ran(config, ran),
        tflops_formula=None if mean is None else config.model.flops_formula(recompute=False),
        tflops_per_gpu_without_recompute=None
        if mean is None
        else asked.flops(recompute=False) / mean / asked.gpus / 1e12,
        **measured,
        **fields,
    )


def measured_fields(config: TrainConfig, outcome: Outcome, *, folder: Path, warmup: int) -> dict[str, Any]:
    """Return the fields of a record that come from the run itself."""
    ending, done = outcome.failure, len(outcome.batch_times_s)
    if ending is None and done < config.steps:
        ending = Failure(cause="error", detail=f"{folder} has {done} of {config.steps} batches; run it again")
    mean, failure = time_or_failure(outcome.batch_times_s, ending, warmup, outcome.new_starts)
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
    """Return the mean over the batches that count (`axonn.training.run_outcome.steady`), or why there is none."""
    kept = steady(len(seconds), warmup, new_starts)
    if failure is None and not kept:
        restarts = " and the first of each new start" if new_starts else ""
        failure = Failure(cause="error", detail=f"no batch but those that warm up: the first {warmup}{restarts}")
    return (sum(seconds[i] for i in kept) / len(kept) if failure is None else None), failure


def left_by_ranks(config: TrainConfig, outcome: Outcome, *, folder: Path, batches: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a record that the suite's own ranks measure besides times and losses. `batches`: those that
    count."""
    return {
        **of_spans(spans_of_batches(folder, config, batches), batches),
        "memory_parts": outcome.memory_parts,
        "memory_of_all": outcome.memory_of_all,
        "bytes_per_batch": outcome.bytes_per_batch,
        "usage": outcome.usage,
        "configuration": configuration_of(config),
    }


def note_of(new_starts: Collection[int]) -> str | None:
    """Return the note on a run that was started several times."""
    if not new_starts:
        return None
    numbers = ", ".join(str(step) for step in sorted(new_starts))
    return f"the run went on in new starts with batch {numbers} (counted from 0), whose times never count"


def spans_of(folder: Path, config: TrainConfig, *, first: int, last: int) -> list[Span]:
    """Return the spans of all ranks in the batches from `first` to before `last`; none where a rank recorded none."""
    return spans_of_batches(folder, config, range(first, last))


def spans_of_batches(folder: Path, config: TrainConfig, batches: Sequence[int]) -> list[Span]:
    """Return the spans of all ranks in these batches, which are in order; none where a rank recorded none."""
    if not batches:
        return []
    files = [span_files(folder / f"spans-{rank}.parquet", first_step=batches[0]) for rank in range(_ranks(config))]
    wanted = set(batches)
    if not all(files):
        return []
    return [span for of_rank in files for file in of_rank for span in read_spans(file) if span.step in wanted]


def parts_of(folder: Path, config: TrainConfig, *, first: int, last: int) -> dict[str, float]:
    """Return the seconds of a batch by part: mean over ranks and over the batches from `first` to before `last`.

    Empty where a rank recorded no spans.
    """
    spans = spans_of(folder, config, first=first, last=last)
    return {name: value / (last - first) for name, value in breakdown(spans)._asdict().items()} if spans else {}


def of_spans(spans: Sequence[Span], batches: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return the fields of a record that follow from the spans of these batches, for one batch."""
    if not spans:
        return {"parts_s": {}, "phases_s": {}, "overlap_s": {}}
    # Between batches that do not follow each other there may be another start: that time belongs to no part.
    windows = [breakdown(window)._asdict() for window in _windows(spans, batches)]
    totals = {
        "parts_s": {name: sum(window[name] for window in windows) for name in windows[0]},
        "overlap_s": overlap(spans)._asdict(),
    }
    means = {name: {part: total / len(batches) for part, total in parts.items()} for name, parts in totals.items()}
    return means | {"phases_s": phases(spans)._asdict()}


def _windows(spans: Sequence[Span], batches: Sequence[int]) -> Iterator[list[Span]]:
    """Yield the spans of each sequence of batches without a gap."""
    for _, pairs in groupby(enumerate(batches), key=lambda pair: pair[1] - pair[0]):
        steps = {step for _, step in pairs}
        if inside := [span for span in spans if span.step in steps]:
            yield inside


def readable_spans(folder: Path, config: TrainConfig) -> str | None:
    """Return why the spans of a run, perhaps of killed ranks, cannot be read; None where they can."""
    try:
        for rank in range(_ranks(config)):
            for file in span_files(folder / f"spans-{rank}.parquet"):
                read_spans(file)
    except RecordError as error:
        return str(error)
    return None


def configuration_of(config: TrainConfig) -> str:
    """Return the hash of a configuration, for records."""
    return fingerprint(config.model_dump(mode="json"), [])


def measures(record: Record, config: TrainConfig) -> bool:
    """Return whether a record is of a run of exactly this configuration."""
    return record.configuration == configuration_of(config)


def function_of(config: TrainConfig) -> str:
    """Return a hash of the function that a run computes, whatever way it does: runs with the same hash have the same
    losses."""
    plain = [v.model_dump(mode="json") for v in (config.model, config.data, config.precision)]
    optimizer = config.optimizer.model_dump(mode="json", exclude={"placement", "bsize", "k", "buckets_resident"})
    return fingerprint([*plain, optimizer, config.batch_size, config.seed], [])


def with_losses_compared(runs: Sequence[tuple[str, Record]], tolerance: float) -> list[Record]:
    """Return the records of `runs`, pairs of (function, record), where one whose losses differ by more than `tolerance`
    (relative) from the first of the same function has become a failure: losses are compared before times."""
    reference: dict[str, Record] = {}
    compared = []
    for function, record in runs:
        first = record if record.failure is not None else reference.setdefault(function, record)
        failure = None if record.failure is not None else _difference(first, record, tolerance)
        changed = record.model_copy(update={"batch_time_s": None, "failure": failure})
        compared.append(record if failure is None else changed)
    return compared


def _difference(first: Record, record: Record, tolerance: float) -> Failure | None:
    # Without losses it is unknown whether they agree.
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
