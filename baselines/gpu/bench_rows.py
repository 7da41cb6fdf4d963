"""Result of a part: rows of one form, whose fields stay empty where they have no meaning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from axonn.config.loading import Loss
from axonn.config.train_config import StrictModel
from axonn.durable_files import replace_durably
from axonn.observability.records import Failure, Machine

SCHEMA = "axonn-gpu/1"


class BenchRow(StrictModel):
    """One measurement, or why there is none."""

    part: str
    model: str
    contender: str
    ours: bool = False
    framework: str | None = None
    """Name and version, where it is not our engine."""
    seconds: float | None = None
    """Median of a batch."""
    seconds_low: float | None = None
    seconds_high: float | None = None
    batch_times_s: list[float] = []
    """Seconds of all turns; each is the mean of the batches of a turn."""
    units_per_s: float | None = None
    unit: str | None = None
    """Unit that throughput counts."""
    tflops: float | None = None
    """TFLOP/s by `formula`, without recompute."""
    formula: str | None = None
    pct_peak: float | None = None
    ratio: float | None = None
    """Our engine's seconds over this one's: median of paired rounds."""
    ratio_low: float | None = None
    ratio_high: float | None = None
    paired: bool | None = None
    """True if both took turns in one process."""
    losses: list[Loss] = []
    loss_difference: Loss | None = None
    """Largest relative difference from the losses of the reference."""
    tolerance: float | None = None
    memory: dict[str, int] = {}
    """Bytes by name: after_init and step_peak as the allocator of the device counts them, batch_peak, and the
    categories of `Engine.memory`."""
    model_bytes: int | None = None
    """Prediction of after_init by the memory model."""
    model_error_pct: float | None = None
    parameters: int | None = None
    share: float | None = None
    """Share of what `share_of` names, between 0 and 1."""
    share_of: str | None = None
    predicted_s: float | None = None
    error_pct: float | None = None
    config: dict[str, Any] | None = None
    """Configuration that was trained, where it was a `TrainConfig`."""
    note: str | None = None
    failure: Failure | None = None


class PartResult(StrictModel):
    """One part, as its file has it."""

    schema_: str = SCHEMA
    part: str
    rows: list[BenchRow]
    about: dict[str, Any] = {}
    """Facts that hold for all rows."""
    quick: bool
    seconds: float
    """Seconds that it took."""
    created: str
    command: str
    machine: Machine


def failed(part: str, model: str, contender: str, failure: Failure, **fields: Any) -> BenchRow:
    """Return a row that says why there is no measurement."""
    return BenchRow(part=part, model=model, contender=contender, failure=failure, **fields)


def write_part(folder: Path, result: PartResult) -> Path:
    """Write the file of a part, replacing an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.part}.json"
    replace_durably(path, json.dumps(result.model_dump(mode="json", exclude_none=True), indent=1) + "\n")
    return path


def read_parts(folder: Path, names: Sequence[str]) -> dict[str, PartResult]:
    """Return the parts of a folder that can be read, in the order of `names`; files of another version are skipped."""
    parts = {}
    for name in names:
        try:
            result = PartResult.model_validate_json((folder / f"{name}.json").read_bytes())
        except (OSError, ValidationError):
            continue
        if result.schema_ == SCHEMA:
            parts[name] = result
    return parts
