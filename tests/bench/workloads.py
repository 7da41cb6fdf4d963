"""The two fixed workloads of all benchmarks, and running contenders on them in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from axonn.launch import mpiexec_command, rank_environment

ROOT = Path(__file__).parents[2]
HIDDEN = {"small": 256, "wide": 768}
Contender = tuple[str, dict[str, Any]]
"""Name of a framework, and what its configuration has beyond the workload."""


def config_of(workload: str, ranks: int) -> dict[str, Any]:
    """6 layers, sequence 128, vocabulary 8k, 8 microbatches of 4; hidden 256 (small) or 768 (wide)."""
    hidden = HIDDEN[workload]
    return {
        "model": {
            "name": workload,
            "layers": 6,
            "hidden": hidden,
            "heads": hidden // 64,
            "seq_len": 128,
            "vocab": 8192,
        },
        "grid": {"inter": ranks},
        "batch_size": 32,
        "microbatch_size": 4,
    }


@dataclass(frozen=True)
class Paired:
    """Seconds of each round by contender, in the contenders' order."""

    times: list[list[float]]
    losses: list[list[float]]

    def ratio(self, over: int, under: int = 0) -> float:
        """Median over the rounds of contender `under`'s time divided by contender `over`'s."""
        return median(a / b for a, b in zip(self.times[under], self.times[over], strict=True))

    @property
    def loss_difference(self) -> float:
        """Largest relative difference of any loss from the first contender's."""
        first = self.losses[0]
        return max(abs(a - b) / abs(a) for other in self.losses for a, b in zip(first, other, strict=True))


def run_paired(
    workload: str, contenders: Sequence[Contender], *, ranks: int, rounds: int, link_rate: str | None = None
) -> Paired:
    """Let contenders train in turn in the same ranks; `link_rate` (as tc writes it) puts a slow link between them."""
    with tempfile.TemporaryDirectory() as folder:
        spec, out = Path(folder) / "spec.json", Path(folder) / "out.json"
        spec.write_text(
            json.dumps(
                {"contenders": [[n, config_of(workload, ranks) | extra] for n, extra in contenders], "rounds": rounds}
            )
        )
        command = [sys.executable, "-m", "tests.bench.paired", str(spec), str(out)]
        env = rank_environment(os.environ)
        if ranks > 1:
            command = mpiexec_command(ranks, command, link_only=link_rate is not None)
        if link_rate is not None:
            command = ["unshare", "-n", "bash", str(ROOT / "tools" / "slownet.sh"), *command]
            env["RATE"] = link_rate
        subprocess.run(command, env=env, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        return Paired(**json.loads(out.read_text()))
