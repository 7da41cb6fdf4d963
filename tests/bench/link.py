"""make bench-link: the comparison of make bench over an emulated link.

The link's rate is set so that one message takes a given share of one stage's forward. With --jitter every contender's
compute takes 10% more on average, unevenly. Needs root, `unshare`, `ip` and `tc` (Debian: util-linux, iproute2).
"""

from __future__ import annotations

import sys

from experiments.slow_link import message_bytes, stage_seconds, why_no_link
from tests.bench.frameworks import compare, options, singles, target
from tests.bench.report import Row, make_console, save, show
from tests.bench.workloads import OVER_A_LINK, ZBV, Jitter

SHARES = (0.05, 0.2, 0.5)
DRIVEN_OVER_1F1B = {0.5: 0.90}
ROUNDS = {"small": 8, "wide": 4, "tiny": 2}


def check_tools() -> None:
    """Exit when a slow link cannot be made here."""
    if (reason := why_no_link()) is not None:
        sys.exit(reason)


def main() -> None:
    given = options(
        __doc__,
        ("--jitter", {"action": "store_true", "help": "10%% more compute on average, unevenly, for everyone"}),
        ("--shares", {"nargs": "+", "type": float, "default": SHARES, "help": "message time / forward"}),
    )
    check_tools()
    console = make_console()
    rows: list[Row] = []
    targets: list[Row] = []
    for workload in given.workloads:
        forward, backward = stage_seconds(workload)
        jitter = Jitter.of(workload, forward, backward) if given.jitter else None
        rounds = 2 if given.quick else ROUNDS[workload]
        single = singles(workload, rounds, jitter=jitter)
        for share in given.shares:
            kbit = int(8 * message_bytes(workload) / (share * forward) / 1000)
            found = compare(workload, rounds, ours=OVER_A_LINK, single=single, link_rate=f"{kbit}kbit", jitter=jitter)
            where = {"workload": workload, "message_over_forward": share, "jitter": given.jitter}
            mine = found.rows(**where)
            title = f"{workload}, forward {1000 * forward:.0f} ms, link {kbit / 1000:.0f} Mbit/s"
            show(f"{title}; 1 rank: {found.single.least:.3f} s", mine, console)
            rows += mine
            reached = found.targets(driven_over_1f1b=DRIVEN_OVER_1F1B.get(share, 1.0))
            if given.jitter:
                ahead = found.ratio(found.best.label, ZBV.label)
                reached[-1] = target(f"{found.best.label} over PyTorch ZBV, jitter", ahead, "< 1.00", ahead < 1.0)
            targets += [{**where, **row} for row in reached]
    show("targets (timings are benchmarks, not tests)", targets, console)
    name = "link-jitter" if given.jitter else "link"
    console.print(f"written to {save(name, rows, quick=given.quick, targets=targets)}")


if __name__ == "__main__":
    main()
