"""What all ranks noted of their processors and machines (`axonn.observability.rank_usage`), put together batch by batch."""

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
    """A line of `usage-K.jsonl`."""

    step: int
    host: str
    seconds: _Seconds
    processor_s: _Seconds
    delay_s: _Seconds | None
    load: _Seconds
    cores: dict[int, tuple[_Seconds, _Seconds]]


def batch_usage(folder: Path, ranks: int, batches: int, *, first: int = 0) -> list[BatchUsage]:
    """Return the usage of the batches from `first` to before `batches`, up to the first that a rank said nothing of."""
    rows = [_rows(usage_file(folder, rank)) for rank in range(ranks)]
    found: list[BatchUsage] = []
    for step in range(first, batches):
        if not all(step in own for own in rows):
            break
        found.append(combined([own[step] for own in rows]))
    return found


def combined(rows: Sequence[_Row]) -> BatchUsage:
    """Return the usage of one batch from the rows of all its ranks."""
    hosts: dict[str, list[_Row]] = {}
    for row in rows:
        hosts.setdefault(row.host, []).append(row)
    worst = max((_of_host(own) for own in hosts.values()), key=lambda one: (one.others_s + one.stolen_s) / one.cores)
    delays = [row.delay_s for row in rows if row.delay_s is not None]
    return worst.model_copy(
        update={
            "processor_s": round(sum(row.processor_s for row in rows), 6),
            "delay_s": max(delays) if len(delays) == len(rows) else None,
        }
    )


def _of_host(rows: Sequence[_Row]) -> BatchUsage:
    """Of the ranks of one host, which may share cores or have some each: every core counts once."""
    cores: dict[int, tuple[float, float]] = {}
    for row in rows:
        cores = {**row.cores, **cores}
    own = sum(row.processor_s for row in rows)
    return BatchUsage(
        seconds=sum(row.seconds for row in rows) / len(rows),
        processor_s=own,
        load=max(row.load for row in rows),
        cores=max(1, len(cores)),
        others_s=round(sum(busy for busy, _ in cores.values()) - own, 6),
        stolen_s=round(sum(stolen for _, stolen in cores.values()), 6),
    )


def _rows(path: Path) -> dict[int, _Row]:
    """The rows of a rank by batch, the last of each; what cannot be read is as if it was not there."""
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
