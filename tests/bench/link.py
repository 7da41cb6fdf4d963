"""make bench-link: the engine beside PyTorch's 1F1B over an emulated link, at 2 ranks.

The link's rate is set so that one message takes a given share of one stage's forward. Needs root, `unshare`, `ip` and
`tc` (Debian: util-linux, iproute2).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from axonn.config import TrainConfig, validate
from axonn.trace import SpanKind, read_spans
from experiments.supervisor import supervise
from tests.bench.workloads import HIDDEN, config_of, run_paired

SHARES = (0.05, 0.2, 0.5)
TARGETS = {0.5: 0.90}
ROUNDS = {"small": 12, "wide": 4}


def forward_seconds(workload: str) -> float:
    """Mean forward of one microbatch on one of 2 stages, from the spans of a short run without the slow link."""
    config = validate(config_of(workload, 2) | {"steps": 4}, TrainConfig, where=workload)
    with tempfile.TemporaryDirectory() as folder:
        outcome = supervise("axonn", config, Path(folder))
        if outcome.failure is not None:
            sys.exit(f"the short run failed: {outcome.failure.detail}")
        spans = [s for rank in range(2) for s in read_spans(Path(folder) / f"spans-{rank}.parquet")]
    return mean(s.end - s.start for s in spans if s.kind == SpanKind.FORWARD and s.step > 0)


def main() -> None:
    missing = [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        need = f"; missing here: {', '.join(missing)}" if missing else ""
        sys.exit(f"make bench-link makes a network namespace with a slow link, for which it must run as root{need}")
    table = Table(title="2 ranks over a slow link: batch time of ours / PyTorch 1F1B (median of paired rounds)")
    for name in ("workload", "message / forward", "link", "in-flight limit 4", "limit 2, as 1F1B", "target"):
        table.add_column(name)
    console = Console()
    for workload in sys.argv[1:] or ["small", "wide"]:
        forward = forward_seconds(workload)
        nbytes = 4 * 128 * HIDDEN[workload] * 4
        for share in SHARES:
            kbit = int(8 * nbytes / (share * forward) / 1000)
            contenders = [
                ("axonn", {}),
                ("torch-pipelining", {}),
                ("axonn", {"schedule": {"in_flight_limit": 2}}),
            ]
            paired = run_paired(workload, contenders, ranks=2, rounds=ROUNDS[workload], link_rate=f"{kbit}kbit")
            if paired.loss_difference > 1e-4:
                sys.exit(f"losses differ by {paired.loss_difference:.1e}: the times may not be compared")
            row = (f"{share:.2f}", f"{kbit / 1000:.0f} Mbit/s", f"{paired.ratio(over=1):.3f}")
            budget = f"{paired.ratio(over=1, under=2):.3f}"
            target = f"<= {TARGETS[share]:.2f}" if share in TARGETS else "-"
            table.add_row(workload, *row, budget, target)
            console.print(
                f"{workload}: message {share} of a forward of {1000 * forward:.0f} ms: "
                f"ratio {row[2]}, at 1F1B's in-flight limit {budget}"
            )
    console.print(table)


if __name__ == "__main__":
    main()
