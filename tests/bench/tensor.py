"""make bench, make bench-link: our two-dimensional tensor parallelism beside PyTorch's, which has one dimension.

Ours on every grid of 2 and of 4 ranks: the one that the communication model chooses counts, with the default number of
sub-shards n. PyTorch's with its embedding cut and whole: the faster one counts. With --link over an emulated link on
which the collectives of a transformer layer take a given share of its compute; there, spans say how much of our
collectives ran under compute. Needs root, `unshare`, `ip` and `tc` for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from axonn.config.train_config import TrainConfig, validate
from axonn.grid import ProcessGrid
from axonn.models.registry import outline_of
from axonn.perf.timing.communication import Training
from axonn.spans import Overlap
from experiments.slow_link import kbit_per_second
from experiments.workloads import MICROBATCHES, SHAPES, config_of
from tests.bench.frameworks import options, target
from tests.bench.link import check_tools
from tests.bench.report import Row, make_console, save, show
from tests.bench.workloads import Contender, Paired, run_paired

RANKS = (2, 4)
SHARES = (0.25, 0.5)
"""Seconds of a layer's collectives over those of its compute."""
HIDING_RANKS = 2
SUB_SHARDS = 2
"""The engine's default."""
ROUNDS = {"small": 16, "wide": 6, "tiny": 2}
ROUNDS_OVER_LINK = {"small": 8, "wide": 4, "tiny": 2}
CALIBRATION_ROUNDS = 4
MOST_OVER_PYTORCH, MOST_OVER_LINK = 1.0, 0.85
LEAST_HIDDEN = 0.7
"""Of what can be hidden with 2 sub-shards."""


def grids_of(ranks: int) -> list[ProcessGrid]:
    """All row x col, the one-dimensional ones that Megatron-LM's scheme is first."""
    return [ProcessGrid(row=row, col=ranks // row) for row in range(1, ranks + 1) if ranks % row == 0]


def depth(workload: str, layers: int | None = None) -> dict[str, Any]:
    """The workload's model, with another number of layers."""
    shape = SHAPES[workload]
    return {"name": workload, **shape, "layers": layers or shape["layers"]}


def sent(workload: str, grid: ProcessGrid, layers: int | None = None) -> float:
    """Bytes that a rank sends in one batch, by the communication model."""
    plain = config_of(workload, {}) | {"model": depth(workload, layers)}
    config = validate(plain, TrainConfig, where=workload)
    training = Training(
        outline=outline_of(config.model),
        grid=grid,
        batch_size=config.batch_size,
        microbatch_size=config.microbatch_size,
    )
    return sum(volume.bytes for volume in training.volume().values())


def chosen_grid(workload: str, ranks: int) -> ProcessGrid:
    """The one on which the communication model says that a rank sends least."""
    return min(grids_of(ranks), key=partial(sent, workload))


def ours(grid: ProcessGrid, sub_shards: int, **more: Any) -> Contender:
    plain = {"grid": {"row": grid.row, "col": grid.col}, "overdecomposition": sub_shards}
    return Contender(f"AxoNN {grid.row} x {grid.col}, n = {sub_shards}", options=plain | more)


def pytorch(ranks: int) -> list[Contender]:
    grid = {"grid": {"col": ranks}}
    return [
        Contender("PyTorch, embedding cut", "pytorch/tensor", grid),
        Contender("PyTorch, embedding whole", "pytorch/tensor-whole-embedding", grid),
    ]


@dataclass(frozen=True)
class Comparison:
    """Ours on the chosen grid first, with 1 and with SUB_SHARDS sub-shards, then on the others, then PyTorch's."""

    contenders: Sequence[Contender]
    paired: Paired

    @property
    def fastest_pytorch(self) -> int:
        return min((i for i, c in enumerate(self.contenders) if not c.ours), key=self.paired.seconds)

    @property
    def over_pytorch(self) -> float:
        return self.paired.ratio(over=self.fastest_pytorch, under=1)

    @property
    def saved(self) -> float:
        """Share of the batch time that cutting into sub-shards saves on the chosen grid."""
        return 1 - self.paired.ratio(over=0, under=1)

    def rows(self, **where: Any) -> list[dict[str, Any]]:
        rows = []
        for i, contender in enumerate(self.contenders):
            bytes_sent = self.paired.sent_bytes[i]
            rows.append(
                {
                    **where,
                    "contender": contender.label,
                    "chosen": i < 2,
                    "batch_s": self.paired.seconds(i),
                    "over_pytorch": self.paired.ratio(over=self.fastest_pytorch, under=i),
                    "sent_mb_per_rank": None if bytes_sent is None else bytes_sent / 1e6,
                    **hiding(self.paired.overlaps[i] if contender.ours else []),
                }
            )
        return rows


def hiding(overlaps: Sequence[Overlap]) -> dict[str, float]:
    """What spans say of the rounds: medians, nothing without spans."""
    if not overlaps:
        return {}
    return {
        "collectives_over_compute": median(o.collective / o.compute for o in overlaps),
        "hidden": median(o.hidden_share for o in overlaps),
        "hidden_of_hideable": median(o.reached for o in overlaps),
    }


def compare(workload: str, ranks: int, rounds: int, *, link_rate: str | None = None) -> Comparison:
    """All of `ranks` ranks in turn; exits when losses differ."""
    chosen = chosen_grid(workload, ranks)
    others = [grid for grid in grids_of(ranks) if grid != chosen]
    contenders = [
        ours(chosen, 1),
        ours(chosen, SUB_SHARDS),
        *(ours(grid, SUB_SHARDS) for grid in others),
        *pytorch(ranks),
    ]
    grid = {"row": chosen.row, "col": chosen.col}
    paired = run_paired(
        workload, contenders, grid=grid, rounds=rounds, link_rate=link_rate, spans=link_rate is not None
    )
    paired.check_losses()
    return Comparison(contenders, paired)


def layer_seconds(workload: str, ranks: int, rounds: int) -> float:
    """What a rank computes for one transformer layer in a batch: the difference that half of the layers make."""
    chosen = chosen_grid(workload, ranks)
    whole = SHAPES[workload]["layers"]
    half = whole // 2
    contenders = [ours(chosen, 1, model=depth(workload, layers)) for layers in (whole, half)]
    paired = run_paired(workload, contenders, grid={"row": chosen.row, "col": chosen.col}, rounds=rounds, spans=True)
    computed = [[o.compute for o in overlaps] for overlaps in paired.overlaps]
    return median(a - b for a, b in zip(*computed, strict=True)) / (whole - half)


def layer_bytes(workload: str, ranks: int) -> float:
    """What all ranks together send for one transformer layer in a batch."""
    chosen = chosen_grid(workload, ranks)
    whole = SHAPES[workload]["layers"]
    half = whole // 2
    return ranks * (sent(workload, chosen) - sent(workload, chosen, half)) / (whole - half)


def on_loopback(workload: str, quick: bool, ranks: Sequence[int]) -> tuple[list[Row], list[Row]]:
    """Rows and targets of make bench."""
    rows: list[Row] = []
    targets: list[Row] = []
    for count in ranks:
        found = compare(workload, count, ROUNDS["tiny" if quick else workload])
        where = {"workload": workload, "ranks": count}
        rows += found.rows(**where)
        targets.append(where | bounded(found, MOST_OVER_PYTORCH))
    return rows, targets


def over_links(workload: str, quick: bool, ranks: Sequence[int]) -> tuple[list[Row], list[Row]]:
    """Rows and targets of make bench-link."""
    rows: list[Row] = []
    targets: list[Row] = []
    rounds = ROUNDS_OVER_LINK["tiny" if quick else workload]
    for count in ranks:
        seconds = layer_seconds(workload, count, min(rounds, CALIBRATION_ROUNDS))
        for share in SHARES:
            kbit = kbit_per_second(layer_bytes(workload, count), share * seconds)
            found = compare(workload, count, rounds, link_rate=f"{kbit}kbit")
            where = {"workload": workload, "ranks": count, "layer_collectives_over_compute": share}
            rows += found.rows(**where, mbit_per_s=kbit / 1000)
            reached = [bounded(found, MOST_OVER_LINK)]
            if count == HIDING_RANKS:
                reached += hidden(found)
            targets += [where | row for row in reached]
    return rows, targets


def bounded(found: Comparison, limit: float) -> dict[str, Any]:
    """The target of batch times."""
    what = f"{found.contenders[1].label} over {found.contenders[found.fastest_pytorch].label}"
    return target(what, found.over_pytorch, f"<= {limit:.2f}", found.over_pytorch <= limit)


def hidden(found: Comparison) -> list[dict[str, Any]]:
    """The targets of asynchrony."""
    share, least = hiding(found.paired.overlaps[1])["hidden_of_hideable"], LEAST_HIDDEN
    return [
        target(f"of what can be hidden, n = {SUB_SHARDS}", share, f">= {least:.2f}", share >= least),
        target(f"share of batch time that n = {SUB_SHARDS} saves", found.saved, "> 0", found.saved > 0),
    ]


def main() -> None:
    given = options(
        __doc__,
        ("--link", {"action": "store_true", "help": "over an emulated link (root only)"}),
        ("--ranks", {"nargs": "+", "type": int, "choices": RANKS, "default": RANKS}),
    )
    if given.link:
        check_tools()
    console = make_console()
    rows: list[Row] = []
    targets: list[Row] = []
    for workload in given.workloads:
        mine, reached = (over_links if given.link else on_loopback)(workload, given.quick, given.ranks)
        show(f"tensor parallelism, {workload}, {MICROBATCHES} microbatches", mine, console)
        rows += mine
        targets += reached
    show("targets (timings are benchmarks, not tests)", targets, console)
    name = "tensor-link" if given.link else "tensor"
    console.print(f"written to {save(name, rows, quick=given.quick, targets=targets)}")


if __name__ == "__main__":
    main()
