"""Proof of equal work: the losses of the first batches compared with those of a plain serial loop on one rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from pathlib import Path

import torch

from axonn.config.train_config import TrainConfig, validate
from axonn.errors import LaunchError
from axonn.observability.procfs import available_cores
from axonn.observability.records import Failure
from axonn.training.framework import load_framework
from axonn.training.places import from_here
from axonn.training.provenance import fingerprint, source_files
from axonn.training.supervision.supervisor import supervise
from baselines.contenders import serial_work
from baselines.coordinator import keep_little
from experiments.workloads import SAME_WORK, config_of

BATCHES = 5
"""Batches whose losses must agree, the warm-up batch included."""
TOLERANCES: Mapping[str, float] = {"float64": 1e-9, "float32": SAME_WORK, "bfloat16": 2e-2, "float16": 5e-3}
"""Largest relative difference of losses, by compute type."""
SERIAL = "pytorch/loop"


def reference_losses(workload: str, *, cache: Path, folder: Path) -> list[float]:
    """Return the losses of the first `BATCHES` batches, from `cache` unless the work or its code has changed.

    `folder`: the run folder. Raises `LaunchError` when the run fails.
    """
    config = validate(config_of(workload, {}) | serial_work(workload) | {"steps": BATCHES}, TrainConfig, where=workload)
    code = source_files("experiments.workloads", *load_framework(SERIAL).source_modules())
    file = cache / f"{workload}-{fingerprint([config.model_dump(mode='json'), torch.__version__], code)}.json"
    if file.exists():
        return [float(loss) for loss in json.loads(file.read_text())["losses"]]
    # All cores, since it is not timed.
    outcome = supervise(SERIAL, config, folder, threads=available_cores())
    if outcome.failure is not None:
        raise LaunchError(
            f"the serial reference of '{workload}' failed: {outcome.failure.detail}; see {from_here(folder)}/log.txt"
        )
    keep_little(folder)
    cache.mkdir(parents=True, exist_ok=True)
    for stale in cache.glob(f"{workload}-*.json"):
        stale.unlink()
    file.write_text(json.dumps({"framework": SERIAL, "losses": outcome.losses}) + "\n")
    return outcome.losses


def difference(losses: Sequence[float], reference: Sequence[float]) -> float | None:
    """Return the largest relative difference of the losses that both have, infinite where one is not finite.

    Returns None where there are none.
    """
    differences = (abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=False))
    return max((d if isfinite(d) else inf for d in differences), default=None)


def disagreement(losses: Sequence[float], reference: Sequence[float], precision: str) -> Failure | None:
    """Return why a run with these losses must not be compared; None when it has done the same work."""
    limit = TOLERANCES[precision]
    worst = difference(losses, reference)
    if worst is None or len(losses) < BATCHES:
        detail = f"only {len(losses)} losses to compare, {BATCHES} are needed"
        return Failure(cause="not-comparable", detail=detail)
    if worst > limit:
        detail = f"losses differ from the serial reference's by {worst:.1e}, more than {limit:.0e} for {precision}"
        return Failure(cause="not-comparable", detail=detail)
    return None
