"""Emulated slow link: its requirements on this machine, and the rate at which messages take a share of the compute."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from statistics import mean

from axonn.config.train_config import TrainConfig, validate
from axonn.errors import LaunchError
from axonn.spans import SpanKind, read_spans
from axonn.training.supervision.supervisor import supervise
from experiments.workloads import MICROBATCH_SIZE, SHAPES, config_of


def why_no_link() -> str | None:
    """Return why a slow link cannot be made on this machine; None when it can."""
    missing = [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or missing:
        need = f"; missing here: {', '.join(missing)}" if missing else ""
        return f"a network namespace with a slow link can only be made as root{need}"
    return None


def message_bytes(workload: str) -> int:
    """Return the bytes of one activation message."""
    shape = SHAPES[workload]
    return MICROBATCH_SIZE * shape["seq_len"] * shape["hidden"] * 4


def stage_seconds(workload: str) -> tuple[float, float]:
    """Return the mean seconds of a microbatch's forward and backward on one of 2 stages, from spans of a short run.

    Raises `LaunchError` when that run fails.
    """
    config = validate(config_of(workload, {"inter": 2}) | {"steps": 4}, TrainConfig, where=workload)
    with tempfile.TemporaryDirectory() as folder:
        outcome = supervise("axonn", config, Path(folder))
        if outcome.failure is not None:
            raise LaunchError(f"the short run failed: {outcome.failure.detail}")
        spans = [s for rank in range(2) for s in read_spans(Path(folder) / f"spans-{rank}.parquet")]

    def seconds(kind: SpanKind) -> float:
        return mean(s.end - s.start for s in spans if s.kind == kind and s.step > 0)

    return seconds(SpanKind.FORWARD), seconds(SpanKind.BACKWARD)


def kbit_per_second(sent_bytes: float, seconds: float) -> int:
    """Return the rate, in kbit/s, of a link shared by all ranks on which `sent_bytes` take so many seconds."""
    return max(1, round(8 * sent_bytes / seconds / 1000))
