"""Processor usage of each batch, combined from the logs of all ranks (`axonn.observability.rank_usage`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from axonn.config.train_config import StrictModel
from axonn.durable_files import read_bytes
from axonn.observability.machine_usage import BatchUsage
from axonn.observability.rank_usage import usage_file

_Seconds = Annotated[float, Field(ge=0, le=1e9)]


class _Row(StrictModel):
    """One line of `usage-K.jsonl`: one batch of one rank."""

    step: int
    host: str
    seconds: _Seconds
    processor_s: _Seconds
    delay_s: _Seconds | None
    load: _Seconds
    cores: dict[int, tuple[_Seconds, _Seconds]]


def batch_usage(folder: Path, ranks: int, batches: int, *, first: int = 0) -> list[BatchUsage]:
    """Return the usage of batches `first` to `batches` - 1, up to the first that is missing from the log of a rank."""
    logs = [_rows(usage_file(folder, rank)) for rank in range(ranks)]
    usage: list[BatchUsage] = []
    for step in range(first, batches):
        if not all(step in rows for rows in logs):
            break
        usage.append(combined([rows[step] for rows in logs]))
    return usage


def combined(rows: Sequence[_Row]) -> BatchUsage:
    """Return the usage of one batch from the rows of all its ranks."""
    hosts: dict[str, list[_Row]] = {}
    for row in rows:
        hosts.setdefault(row.host, []).append(row)
    worst = max(map(_of_host, hosts.values()), key=lambda usage: (usage.others_s + usage.stolen_s) / usage.cores)
    delays = [row.delay_s for row in rows if row.delay_s is not None]
    return worst.model_copy(
        update={
            "processor_s": round(sum(row.processor_s for row in rows), 6),
            "delay_s": max(delays) if len(delays) == len(rows) else None,
        }
    )


def _of_host(rows: Sequence[_Row]) -> BatchUsage:
    """Return the usage of one host from the rows of its ranks. Ranks may share cores: each core counts once."""
    cores: dict[int, tuple[float, float]] = {}
    for row in rows:
        cores = {**row.cores, **cores}
    processor_s = sum(row.processor_s for row in rows)
    return BatchUsage(
        seconds=sum(row.seconds for row in rows) / len(rows),
        processor_s=processor_s,
        load=max(row.load for row in rows),
        cores=max(1, len(cores)),
        others_s=round(sum(busy for busy, _ in cores.values()) - processor_s, 6),
        stolen_s=round(sum(stolen for _, stolen in cores.values()), 6),
    )


def _rows(path: Path) -> dict[int, _Row]:
    """Return the rows of one rank by batch, the last one of each; unreadable rows are left out."""
    return {row.step: row for row in _readable(path)}


def _readable(path: Path) -> Iterator[_Row]:
    try:
        lines = read_bytes(path).split(b"\n")[:-1]
    except OSError:
        return
    for line in lines:
        try:
            yield _Row.model_validate_json(line)
        except ValidationError:
            continue
