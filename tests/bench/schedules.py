"""make bench-schedules: schedules on 8 ranks whose compute is a sleep, beside what the simulator says of them.

A message takes a given share of a forward, and every task takes 10% more on average, unevenly; the simulator gets the
same times of tasks. Two constants of the machine are measured in the first round, and are the same for all schedules:
what a task takes beyond its sleep, and what a message takes by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from axonn.distributed.launch import mpiexec_command, rank_environment
from axonn.perf.machine.network import MessageTime
from axonn.perf.pipeline.simulator import simulate
from axonn.schedules import ScheduleSpec, Task, make_schedule
from tests.bench.report import Row, make_console, save, show
from tests.bench.sleeping import Compute
from tests.bench.workloads import ROOT

SHARES = (0.0, 0.05, 0.2, 0.5)
DIFFERENT = 0.03
"""Simulated times that differ by more than this must be measured in the same order."""


def cases(stages: int) -> dict[str, dict[str, Any]]:
    """Schedules by name. 1F1B holds one microbatch per stage: the first limit is its memory."""
    limits = [(share, round(share * stages)) for share in (1, 1.25, 1.5, 2)]
    return {
        **{f"message-driven, limit {share} G_inter": {"in_flight_limit": limit} for share, limit in limits},
        "1F1B": {"name": "1f1b"},
        "interleaved 1F1B, 2 chunks": {"name": "interleaved-1f1b", "chunks": 2},
        "zero-bubble": {"name": "zero-bubble"},
        "zero-bubble V": {"name": "zero-bubble", "chunks": 2, "placement": "v"},
        "message-driven zero-bubble": {"name": "message-driven-zero-bubble"},
        "message-driven zero-bubble V": {"name": "message-driven-zero-bubble", "chunks": 2, "placement": "v"},
    }


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run the ranks (`tests.bench.schedule_ranks`) and give back what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as name:
        spec, out, log = (Path(name) / file for file in ("spec.json", "out.json", "log.txt"))
        spec.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "tests.bench.schedule_ranks", str(spec), str(out)]
        with log.open("w") as stream:
            ended = subprocess.run(
                mpiexec_command(settings["stages"], command),
                env=rank_environment(os.environ),
                cwd=ROOT,
                stdout=stream,
                stderr=stream,
                check=False,
            )
        if ended.returncode:
            sys.exit(f"the ranks failed:\n{log.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def simulated(settings: Mapping[str, Any], case: Mapping[str, Any], share: float, found: Mapping[str, Any]) -> float:
    """Seconds of the batch with the constants that `found` holds."""
    spec = ScheduleSpec(**case)
    stages, microbatches = settings["stages"], settings["microbatches"]
    overhead: float = found["task_overhead_s"]
    compute = Compute(settings["forward_s"], spec.layout(stages), settings["jitter"])
    message = MessageTime(latency=max(share * settings["forward_s"], found["message_s"]), transfer=0.0)
    schedules = [make_schedule(spec, stage=s, stages=stages, microbatches=microbatches) for s in range(stages)]

    def seconds(stage: int, task: Task) -> float:
        return compute(stage, task) + overhead

    return simulate(schedules, seconds=seconds, message=lambda sender, receiver: message).makespan


def disagreements(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Pairs of schedules at one latency whose measured order is not the simulated one, where that is clear."""
    found = []
    for a, b in combinations(rows, 2):
        if a["message_over_forward"] != b["message_over_forward"]:
            continue
        fast, slow = sorted((a, b), key=lambda row: row["simulated_s"])
        if slow["simulated_s"] > (1 + DIFFERENT) * fast["simulated_s"] and fast["measured_s"] >= slow["measured_s"]:
            found.append(
                {
                    "message_over_forward": a["message_over_forward"],
                    "faster_in_simulation": fast["schedule"],
                    "slower_in_simulation": slow["schedule"],
                    "simulated_ratio": slow["simulated_s"] / fast["simulated_s"],
                    "measured_ratio": slow["measured_s"] / fast["measured_s"],
                }
            )
    return found


def rows_of(settings: Mapping[str, Any], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Measured beside simulated, by latency and schedule."""
    # What the stages compute, if they never waited.
    bound = settings["microbatches"] * settings["forward_s"] * 3 * (1 + settings["jitter"])
    rows = []
    for s, share in enumerate(settings["shares"]):
        for c, (label, case) in enumerate(settings["cases"].items()):
            # Times of tasks are given, so whatever varies from round to round is disturbance.
            measured = min(times[s][c] for times in found["times"])
            expected = simulated(settings, case, share, found)
            rows.append(
                {
                    "message_over_forward": share,
                    "schedule": label,
                    "measured_s": measured,
                    "simulated_s": expected,
                    "simulation_error_pct": 100 * (expected / measured - 1),
                    "compute_share": bound / measured,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few ranks, short sleeps: tries the benchmark itself")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    quick = given.quick
    stages = 4 if quick else 8
    settings = {
        "stages": stages,
        "microbatches": 8 if quick else 32,
        "forward_s": 0.004 if quick else 0.02,
        "jitter": 0.1,
        "shares": [0.0, 0.5] if quick else list(SHARES),
        "rounds": 1 if quick else given.rounds,
        "cases": cases(stages),
    }
    console = make_console()
    found = measure(settings)
    rows = rows_of(settings, found)
    constants = {name: found[name] for name in ("task_overhead_s", "message_s")}
    title = ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in constants.items())
    show(f"{stages} ranks, {settings['microbatches']} microbatches; {title.replace('_s ', ' ')}", rows, console)
    against = disagreements(rows)
    if against:
        show("measured and simulated order disagree", against, console)
    else:
        console.print(f"orders agree wherever simulated times differ by more than {100 * DIFFERENT:.0f}%")
    path = save("schedules", rows, quick=quick, settings=settings, constants=constants, disagreements=against)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
