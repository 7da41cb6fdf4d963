"""Measurement of this machine for the performance model (`axonn calibrate`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from axonn.config.train_config import FloatType
from axonn.device.devices import DeviceType
from axonn.distributed.launch import mpiexec_command, rank_environment
from axonn.errors import ConfigError, LaunchError
from axonn.observability.busy_watch import BusyWatch
from axonn.observability.procfs import available_cores
from axonn.perf.machine.machine_file import MachineFile
from axonn.training.places import PROJECT
from axonn.training.supervision.process_group import end_process_group
from axonn.training.supervision.session_folders import session_folders
from experiments.calibration.calibration_worker import PROGRESS, RESULT, CalibrationJob
from experiments.calibration.machine_description import CalibrationResults, machine_of, write_machine

LOCAL = PROJECT / "experiments" / "machines" / "local.yaml"
LOCAL_GPU = LOCAL.with_name("local-gpu.yaml")
_TIMEOUT_S = 600.0
_POLL_S = 0.1


def calibrate(
    *,
    ranks: int | None = None,
    precision: FloatType | None = None,
    quick: bool = False,
    out: Path | None = None,
    device: DeviceType = "cpu",
    on_part: Callable[[str], None] = lambda name: None,
) -> MachineFile:
    """Measure with one rank and with `ranks` (default: one per core), and write the machine file `out` (default:
    `LOCAL`, for a GPU `LOCAL_GPU`).

    A GPU is measured by one rank alone. `precision`: by default float32, on a GPU bfloat16. `on_part` is called with
    the name of each part of the measurement. Raises `ConfigError` for fewer than one rank, or several on a GPU, and
    `LaunchError` when the ranks cannot start or one of them fails.
    """
    on_gpu = device == "cuda"
    count = (1 if on_gpu else available_cores()) if ranks is None else ranks
    precision = precision or ("bfloat16" if on_gpu else "float32")
    out = out or (LOCAL_GPU if on_gpu else LOCAL)
    if count < 1:
        raise ConfigError(f"{count} ranks were asked for; ask for at least one")
    if on_gpu and count > 1:
        raise ConfigError(f"{count} ranks were asked for, and a GPU is measured by one alone; leave out --ranks")
    results: list[dict[str, Any]] = []
    watch = BusyWatch()
    for size in sorted({1, count}):

        def report(part: str, size: int = size) -> None:
            on_part(f"{size} rank{'s' if size > 1 else ''}: {part}")

        job = CalibrationJob(precision=precision, quick=quick, device=device)
        results.append(_measured(job, size, report))
    options = [f"--ranks {count}", f"--precision {precision}", *["--quick"] * quick, *["--device cuda"] * on_gpu]
    busy = "" if watch.warning() is None else f"; machine busy: others took {watch.share():.0%} of the cores"
    measured = CalibrationResults(
        ranks=count,
        precision=precision,
        source=f"axonn calibrate {' '.join(options)}{busy}",
        alone=results[0],
        all_ranks=results[1] if count > 1 else None,
    )
    machine = machine_of(measured, name=out.stem)
    write_machine(out, machine)
    return machine


def _measured(job: CalibrationJob, ranks: int, on_part: Callable[[str], None]) -> dict[str, Any]:
    """Return the results of rank 0. The ranks never outlive this call."""
    command = [sys.executable, "-m", "experiments.calibration.calibration_worker"]
    with tempfile.TemporaryDirectory(prefix="axonn-calibrate-") as name, session_folders() as session:
        folder = Path(name)
        job.write(folder)
        command.append(name)
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                mpiexec_command(ranks, command) if ranks > 1 else command,
                env=rank_environment(os.environ) | session,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                _watch(process, folder / PROGRESS, on_part)
            finally:
                end_process_group(process)
        if not (folder / RESULT).exists():
            tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-3:]
            raise LaunchError(
                f"calibrating with {ranks} rank(s) failed (code {process.returncode}): {' | '.join(tail)}"
            )
        return dict(json.loads((folder / RESULT).read_text()))


def _watch(process: subprocess.Popen[bytes], progress: Path, on_part: Callable[[str], None]) -> None:
    """Wait for the end, and call `on_part` for each new part. Raises `LaunchError` when it takes too long."""
    reported = 0
    started = time.monotonic()
    while process.poll() is None:
        time.sleep(_POLL_S)
        parts = progress.read_text().splitlines() if progress.exists() else []
        for part in parts[reported:]:
            on_part(part)
        reported = len(parts)
        if time.monotonic() - started > _TIMEOUT_S:
            raise LaunchError(f"calibrating is not done after {_TIMEOUT_S:.0f} s; try --quick, or fewer --ranks")
