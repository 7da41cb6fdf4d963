"""make bench: our schedules beside PyTorch's pipelines at 2 ranks, and the plain loop at 1.

The bound of 2 ranks is half of the time of 1 rank (ours or the plain loop's, whichever is less); a contender's share of
the bound says how much of its time it would take if nothing but compute cost anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from baselines.statistics import paired_ratios
from tests.bench.report import Row, make_console, save, show
from tests.bench.workloads import (
    DRIVEN,
    ONE_F_ONE_B,
    OTHERS,
    OURS,
    ZBV,
    Contender,
    Jitter,
    Paired,
    run_paired,
)

PLAIN_LOOP = Contender("PyTorch loop", "pytorch/loop")
ROUNDS = {"small": 16, "wide": 6, "tiny": 2}
LEAST_SHARE = 0.97
"""Share of the bound that our best schedule is to reach."""


@dataclass(frozen=True)
class OneRank:
    """Seconds of a batch on 1 rank, of ours and of the plain loop."""

    ours: list[float]
    loop: list[float]

    def __add__(self, later: OneRank) -> OneRank:
        return OneRank(self.ours + later.ours, self.loop + later.loop)

    @property
    def least(self) -> float:
        return min(median(self.ours), median(self.loop))

    @property
    def ratio(self) -> float:
        """Ours over the loop's: median over paired rounds."""
        return median(paired_ratios(self.ours, self.loop))


def one_rank(workload: str, rounds: int, *, jitter: Jitter | None = None, copies: int = 1) -> OneRank:
    """Ours and the plain loop in turn. `copies` at once show what a core does while the other is busy too."""
    paired = run_paired(workload, [DRIVEN, PLAIN_LOOP], grid={}, rounds=rounds, jitter=jitter, copies=copies)
    paired.check_losses()
    return OneRank(*paired.times)


@dataclass(frozen=True)
class Comparison:
    """All contenders on one workload: times at 2 ranks, and the 1-rank times around them."""

    contenders: Sequence[Contender]
    paired: Paired
    single: OneRank
    both_busy: OneRank

    def share(self, contender: int) -> float:
        """Of the bound."""
        return self.single.least / 2 / self.paired.seconds(contender)

    def ratio(self, label: str, over: str) -> float:
        labels = [c.label for c in self.contenders]
        return self.paired.ratio(over=labels.index(over), under=labels.index(label))

    @property
    def best(self) -> Contender:
        """Our fastest schedule."""
        ours = [i for i, c in enumerate(self.contenders) if c.ours]
        return self.contenders[min(ours, key=self.paired.seconds)]

    def rows(self, **where: Any) -> list[dict[str, Any]]:
        first, busy = self.single.least / 2, self.both_busy.least / 2
        over, zbv = (next(i for i, c in enumerate(self.contenders) if c == x) for x in (ONE_F_ONE_B, ZBV))
        return [
            {
                **where,
                "contender": c.label,
                "batch_s": self.paired.seconds(i),
                "over_1f1b": self.paired.ratio(over=over, under=i),
                "over_zbv": self.paired.ratio(over=zbv, under=i),
                "share_of_bound": first / self.paired.seconds(i),
                "share_of_bound_both_cores_busy": busy / self.paired.seconds(i),
            }
            for i, c in enumerate(self.contenders)
        ]

    def targets(self, *, driven_over_1f1b: float) -> list[dict[str, Any]]:
        """Each target with what was reached."""
        best = self.best.label
        share = self.share([c.label for c in self.contenders].index(best))
        driven, zbv = self.ratio(DRIVEN.label, ONE_F_ONE_B.label), self.ratio(best, ZBV.label)
        limit = driven_over_1f1b
        return [
            target("message-driven over PyTorch 1F1B", driven, f"<= {limit:.2f}", driven <= limit),
            target(f"share of the bound, {best}", share, f">= {LEAST_SHARE:.2f}", share >= LEAST_SHARE),
            target(f"{best} over PyTorch ZBV", zbv, "<= 1.00", zbv <= 1.0),
        ]


def target(what: str, figure: float, aim: str, reached: bool) -> dict[str, Any]:
    return {"what": what, "figure": figure, "target": aim, "reached": reached}


def compare(
    workload: str,
    rounds: int,
    *,
    ours: Sequence[Contender] = OURS,
    single: tuple[OneRank, OneRank] | None = None,
    link_rate: str | None = None,
    jitter: Jitter | None = None,
) -> Comparison:
    """`ours` and the others on one workload at 2 ranks; `single`: the 1-rank times, if they have been measured."""
    contenders = (*ours, *OTHERS)
    paired = run_paired(workload, contenders, grid={"inter": 2}, rounds=rounds, link_rate=link_rate, jitter=jitter)
    paired.check_losses()
    return Comparison(contenders, paired, *(single or singles(workload, rounds, jitter=jitter)))


def singles(workload: str, rounds: int, *, jitter: Jitter | None = None) -> tuple[OneRank, OneRank]:
    """1-rank times with the other core idle, and busy with the same."""
    half = max(2, rounds // 2)
    return one_rank(workload, half, jitter=jitter), one_rank(workload, half, jitter=jitter, copies=2)


def options(description: str | None, *extra: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """The command line that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("workloads", nargs="*", default=[], help="small, wide; default both")
    parser.add_argument("--quick", action="store_true", help="a tiny workload, few rounds: tries the benchmark itself")
    for flag, settings in extra:
        parser.add_argument(flag, **settings)
    given = parser.parse_args()
    given.workloads = given.workloads or (["tiny"] if given.quick else ["small", "wide"])
    return given


def main() -> None:
    given = options(__doc__)
    console = make_console()
    rows: list[Row] = []
    targets: list[Row] = []
    for workload in given.workloads:
        found = compare(workload, 2 if given.quick else ROUNDS[workload])
        mine = found.rows(workload=workload)
        reached = [
            target("1 rank over the plain loop", found.single.ratio, "<= 1.03", found.single.ratio <= 1.03),
            *found.targets(driven_over_1f1b=1.0),
        ]
        show(f"{workload}, 2 ranks; 1 rank: {found.single.least:.3f} s", mine, console)
        rows += mine
        targets += [{"workload": workload, **row} for row in reached]
    show("targets (timings are benchmarks, not tests)", targets, console)
    console.print(f"written to {save('frameworks', rows, quick=given.quick, targets=targets)}")


if __name__ == "__main__":
    main()
