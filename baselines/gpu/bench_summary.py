"""Files that the benchmark leaves: summary.json with all rows, and records of what was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from axonn.config.train_config import TrainConfig, validate
from axonn.durable_files import replace_durably
from axonn.observability.records import Execution, Failure, Machine, Record, Workload, settings_of, write_records
from axonn.training.engine_framework import EngineFramework
from axonn.training.places import PROJECT
from baselines.gpu.bench_rows import BenchRow, PartResult

GPU_RECORDS = PROJECT / "results" / "measured" / "gpu.json"
EXPERIMENT = "gpu"


def write_summary(
    folder: Path, parts: Mapping[str, PartResult], *, command: str, machine: Machine, quick: bool
) -> Path:
    """Write summary.json of a folder, from all parts that were measured on this device, at whatever time."""
    content = {
        "kind": "measured",
        "quick": quick,
        "device": machine.device,
        "rows": [row.model_dump(mode="json", exclude_none=True) for part in parts.values() for row in part.rows],
        "parts": {
            name: {
                "seconds": part.seconds,
                "created": part.created,
                "command": part.command,
                "commit": part.machine.commit,
                "clocks": part.machine.clocks,
                "about": part.about,
            }
            for name, part in parts.items()
        },
        "failures": [
            {"part": row.part, "model": row.model, "contender": row.contender}
            | row.failure.model_dump(exclude_none=True)
            for part in parts.values()
            for row in part.rows
            if row.failure is not None
        ],
        "provenance": {
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine.model_dump(exclude_none=True),
            "commit": machine.commit,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "summary.json"
    replace_durably(path, json.dumps(content, indent=1) + "\n")
    return path


def write_gpu_records(path: Path, parts: Mapping[str, PartResult]) -> None:
    """Write a record of every row that trained something, or should have."""
    write_records(path, [record for part in parts.values() for record in records_of(part)])


def records_of(part: PartResult) -> Iterator[Record]:
    """Yield the records of one part."""
    for row in part.rows:
        if row.config is not None:
            yield _record(row, part)


def _record(row: BenchRow, part: PartResult) -> Record:
    config = validate(row.config or {}, TrainConfig, where=row.model)
    grid = config.grid
    failure = row.failure
    if failure is None and row.seconds is None:
        failure = Failure(cause="error", detail="nothing was timed")
    done = failure is None
    fields: dict[str, Any] = {}
    if done:
        fields = {
            "batch_time_s": row.seconds,
            "tflops_per_gpu_without_recompute": row.tflops,
            "tflops_formula": row.formula,
            "pct_peak": row.pct_peak,
        }
    version = EngineFramework().version() if row.ours else row.framework or "not known"
    return Record(
        kind="measured",
        experiment=EXPERIMENT,
        point=f"{row.part}: {row.model}, {row.contender}",
        asked=Workload.of(
            config.model,
            # Ranks share the device; each counts.
            gpus=grid.size,
            batch_size=config.batch_size,
            precision=config.precision.compute,
        ),
        ran=Execution(
            framework=EngineFramework.label if row.ours else row.contender,
            version=version,
            grid=grid,
            microbatch_size=config.microbatch_size,
            microbatches=config.batch_size // (config.microbatch_size * grid.data),
        ),
        settings=settings_of(config),
        machine=part.machine,
        source=part.command,
        batch_times_s=row.batch_times_s,
        losses=row.losses,
        memory_bytes=row.memory.get("batch_peak"),
        memory_parts=row.memory,
        created=part.created,
        failure=failure,
        note=row.note,
        **fields,
    )


def same_device(parts: Mapping[str, PartResult], device: str | None) -> dict[str, PartResult]:
    """Return the parts that were measured on this device: others are never shown beside them."""
    return {name: part for name, part in parts.items() if part.machine.device == device}
