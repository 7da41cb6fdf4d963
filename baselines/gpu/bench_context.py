"""The context of every part: the plan, the time it has, and how to run a task in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axonn.config.train_config import TrainConfig
from axonn.distributed.launch import rank_environment
from axonn.errors import AxonnError
from axonn.observability.procfs import available_cores
from axonn.observability.records import Failure
from axonn.training.framework import load_adapter, load_framework
from axonn.training.places import PROJECT
from axonn.training.run_outcome import Outcome
from axonn.training.supervision.process_group import end_process_group
from axonn.training.supervision.supervisor import supervise
from baselines.gpu.bench_rows import BenchRow, PartResult
from baselines.gpu.bench_work import BenchPlan
from baselines.gpu.peaks import Peak

LEAST_S = 3.0
"""Seconds below which nothing is started."""
_RUNS = PROJECT / "runs" / "gpu"


class NotMeasured(Exception):
    """A measurement that failed, with its `Failure`."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


@dataclass
class Context:
    """The surroundings of one part. `deadline`: the value of `clock` when its time is used up."""

    plan: BenchPlan
    part: str
    deadline: float
    say: Callable[[str], None] = lambda what: None
    clock: Callable[[], float] = time.monotonic
    runs: Path = _RUNS
    earlier: Mapping[str, PartResult] = field(default_factory=dict)
    """Parts that were measured before, on this device."""
    peak: Peak | None = None

    @property
    def left_s(self) -> float:
        """Seconds that this part still has."""
        return self.deadline - self.clock()

    @property
    def host_threads(self) -> int:
        """Threads for work on the host: beside a GPU all cores, in miniature 1."""
        return available_cores() if self.plan.device == "cuda" else 1

    def folder(self, name: str) -> Path:
        """Return the run folder of a measurement."""
        return self.runs / self.part / "".join(c if c.isalnum() else "-" for c in name.lower())

    def limit(self, most_s: float | None = None) -> float:
        """Return the seconds that a measurement may take. Raises `NotMeasured` when the time of the part is used up."""
        left = self.left_s if most_s is None else min(self.left_s, most_s)
        if left < LEAST_S:
            raise NotMeasured(
                Failure(cause="timeout", detail=f"the time of part '{self.part}' was used up before its turn")
            )
        return left

    def task(self, task: str, *, name: str, most_s: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Run `task` of `baselines.gpu.bench_worker` in a process of its own and return its result.

        The process frees its memory at its end. Raises `NotMeasured` when it fails or takes longer than `most_s`, or
        than the part has.
        """
        limit = self.limit(most_s)
        self.say(name)
        folder = self.folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        result = folder / "result.json"
        result.unlink(missing_ok=True)
        # The task gets less time than the limit at which it is killed.
        spec = {"task": task, "device": self.plan.device, "seconds": 0.85 * limit, "arguments": arguments}
        (folder / "task.json").write_text(json.dumps(spec, indent=1))
        with open(folder / "log.txt", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "baselines.gpu.bench_worker", str(folder)],
                env=worker_environment(self.plan),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                raise NotMeasured(Failure(cause="timeout", detail=f"not finished after {limit:.0f} s")) from None
            finally:
                end_process_group(process, grace_s=0.0)
        return _read(result, code, folder)

    def ranks(
        self, framework: str, config: TrainConfig, *, name: str, most_s: float | None = None, threads: int = 1
    ) -> Outcome:
        """Run several ranks, or another framework. Raises `NotMeasured` when the run fails."""
        limit = self.limit(most_s)
        self.say(name)
        try:
            reason = self.refusal(framework) or load_framework(framework).unavailable(config)
            if reason is not None:
                raise NotMeasured(Failure(cause="unavailable", detail=reason))
            outcome = supervise(
                framework, config, self.folder(name), timeout_s=limit, device=self.plan.device, threads=threads
            )
        except (AxonnError, OSError) as error:
            raise NotMeasured(Failure(cause="error", detail=str(error))) from error
        if outcome.failure is not None:
            raise NotMeasured(outcome.failure)
        return outcome

    def refusal(self, framework: str) -> str | None:
        """Return why a framework cannot run on this device at all; None where it can."""
        adapter = load_adapter(framework.partition("/")[0])
        can = adapter.capabilities()
        if not can.available:
            return can.reason or f"{framework} is not installed"
        # Frameworks in our own environment run wherever our engine runs.
        if adapter.name not in ("axonn", "pytorch") and self.plan.device not in can.devices:
            return f"what is installed of {adapter.label} runs on {', '.join(can.devices)} only"
        return None


def worker_environment(plan: BenchPlan) -> dict[str, str]:
    """Return the environment of a worker: with a GPU all cores make initial weights and step optimizers of the host; in
    miniature one is enough, since threads that wait for each other on a busy machine take a hundred times as long."""
    environment = rank_environment(os.environ, threads=available_cores() if plan.device == "cuda" else 1)
    if plan.device == "cuda":
        # Sizes change little from batch to batch; expandable segments use the gaps between them.
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return environment


def _read(result: Path, code: int, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(result.read_text())
    except (OSError, json.JSONDecodeError):
        tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-3:]
        killed = "; the system kills a process like this when memory runs out" if code == -signal.SIGKILL else ""
        how = f"killed by signal {-code}{killed}" if code < 0 else f"ended with code {code}"
        detail = " | ".join([how, *tail])
        raise NotMeasured(Failure(cause="out-of-memory" if killed else "error", detail=detail)) from None
    if (failure := content.get("failure")) is not None:
        raise NotMeasured(Failure(**failure))
    fields: dict[str, Any] = content["result"]
    return fields


Part = Callable[[Context], tuple[list[BenchRow], dict[str, Any]]]
"""A function that measures a part: its rows, and what holds for all of them. It never raises `NotMeasured`, which
becomes a row."""
