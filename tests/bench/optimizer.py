"""make bench-optimizer: what the memory optimisation saves and costs, and what overlapping the reduction gains.

In bfloat16 with float32 masters. (a) Optimizer state in host memory beside on the device, at 1 rank: bytes of model
state on the device, and seconds after the pipeline. (b) At G_data = 2, all-reduces in chunks of k buckets under the
optimizer beside one all-reduce before it, on loopback and (as root) over an emulated link on which the all-reduce
takes a given share of the step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from statistics import median
from typing import Any

from axonn.config.train_config import validate
from axonn.models.gpt.gpt_config import GPTConfig
from experiments.workloads import SHAPES
from tests.bench.frameworks import options, target
from tests.bench.report import Row, make_console, save, show
from tests.bench.workloads import Contender, Paired, run_paired

ROUNDS = {"small": 5, "wide": 3, "tiny": 2}
CHUNKS: Sequence[int | None] = (None, 4, 1)
LINKS = (1.0,)
"""Seconds of the all-reduce over those of the step."""
LEAST_SAVING = 4.0
ON_DEVICE = ("parameters", "gradients", "optimizer_state", "buckets")


def parameters_of(workload: str) -> int:
    return validate({"name": workload, **SHAPES[workload]}, GPTConfig, where=workload).parameters


def bsize_of(workload: str) -> int:
    """The largest bucket with which two of them in flight leave the saving at 4: 16 x 2 x bsize <= parameters."""
    return parameters_of(workload) // 32


def contender(workload: str, placement: str, k: int | None) -> Contender:
    chunks = "one all-reduce, then the step" if k is None else f"overlapped, k = {k}"
    return Contender(
        f"{placement}, {chunks}",
        options={
            "precision": {"compute": "bfloat16"},
            "optimizer": {"placement": placement, "bsize": bsize_of(workload), "k": k},
        },
    )


def state_bytes(paired: Paired, number: int) -> int:
    """Of model state on the device."""
    memory = paired.memory[number]
    assert memory is not None
    return sum(memory[name] for name in ON_DEVICE)


def offloading(workload: str, rounds: int) -> tuple[list[dict[str, Any]], float]:
    """Rows of (a), and the seconds of the resident step."""
    contenders = [contender(workload, placement, 4) for placement in ("device", "offloaded")]
    paired = run_paired(workload, contenders, grid={}, rounds=rounds, spans=True)
    paired.check_losses()
    rows = []
    for i, placement in enumerate(("device", "offloaded")):
        memory = paired.memory[i]
        assert memory is not None
        rows.append(
            {
                "workload": workload,
                "placement": placement,
                "state_bytes_on_device": state_bytes(paired, i),
                "bytes_per_parameter": state_bytes(paired, i) / parameters_of(workload),
                "saving": state_bytes(paired, 0) / state_bytes(paired, i),
                "bytes_on_host": memory["host"],
                "batch_s": paired.seconds(i),
                "batch_ratio": paired.ratio(over=0, under=i),
                "step_s": median(paired.tails[i]),
                "step_ratio": paired.tail_ratio(over=0, under=i),
            }
        )
    return rows, median(paired.tails[0])


def overlapping(workload: str, rounds: int, step_s: float, share: float | None) -> list[dict[str, Any]]:
    """Rows of (b) on loopback, or over a link on which the all-reduce takes `share` of `step_s`."""
    rate = None
    if share is not None:
        # Each of two ranks sends its bfloat16 gradients once, and both share the link.
        bits = 8 * 2 * 2 * parameters_of(workload)
        rate = f"{max(1, round(bits / (share * step_s) / 1e6))}mbit"
    contenders = [contender(workload, placement, k) for placement in ("device", "offloaded") for k in CHUNKS]
    paired = run_paired(workload, contenders, grid={"data": 2}, rounds=rounds, link_rate=rate, spans=True)
    paired.check_losses()
    first = {i: i - i % len(CHUNKS) for i in range(len(contenders))}
    return [
        {
            "workload": workload,
            "link": rate or "loopback",
            "all_reduce_over_step": share,
            "optimizer": c.label,
            "batch_s": paired.seconds(i),
            "batch_ratio": paired.ratio(over=first[i], under=i),
            "reduction_and_step_s": median(paired.tails[i]),
            "reduction_and_step_ratio": paired.tail_ratio(over=first[i], under=i),
        }
        for i, c in enumerate(contenders)
    ]


def main() -> None:
    given = options(__doc__)
    console = make_console()
    a: list[Row] = []
    b: list[Row] = []
    targets: list[Row] = []
    links: tuple[float | None, ...] = (None,)
    if os.geteuid() == 0:
        links = (None, *LINKS)
    else:
        console.print("no emulated link: that needs root")
    for workload in given.workloads:
        rounds = 2 if given.quick else ROUNDS[workload]
        rows, step_s = offloading(workload, rounds)
        saving = rows[1]["saving"]
        targets.append(
            target(f"{workload}: state on the device, resident over offloaded", saving, ">= 4", saving >= LEAST_SAVING)
        )
        a += rows
        for share in links:
            b += overlapping(workload, rounds, step_s, share)
    show("(a) optimizer state in host memory, 1 rank", a, console)
    show("(b) reduction overlapped with the step, G_data = 2", b, console)
    show("targets", targets, console)
    console.print(f"written to {save('optimizer', a, quick=given.quick, overlapped=b, targets=targets)}")


if __name__ == "__main__":
    main()
