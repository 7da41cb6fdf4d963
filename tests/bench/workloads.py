"""Running contenders on the fixed workloads in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from axonn.config.train_config import TrainConfig, validate
from axonn.distributed.launch import mpiexec_command, rank_environment
from axonn.inter_layer.stage import virtual_spans
from axonn.models.gpt.gpt_model import GPT
from axonn.observability.procfs import available_cores
from axonn.schedules import ChunkLayout
from axonn.spans import Overlap
from baselines.equal_work import difference
from baselines.statistics import paired_ratios
from experiments.workloads import SAME_WORK, config_of

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Contender:
    """A framework with what its configuration has beyond the workload, or in place of it."""

    label: str
    framework: str = "axonn"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.framework == "axonn"


def _schedule(label: str, **options: Any) -> Contender:
    return Contender(f"AxoNN {label}", options={"schedule": options})


DRIVEN = Contender("AxoNN message-driven")
OURS = (
    DRIVEN,
    _schedule("message-driven, 1F1B's memory", in_flight_limit=2),
    _schedule("zero-bubble", name="zero-bubble"),
    _schedule("zero-bubble V", name="zero-bubble", chunks=2, placement="v"),
    _schedule("message-driven zero-bubble", name="message-driven-zero-bubble"),
    _schedule("message-driven zero-bubble V", name="message-driven-zero-bubble", chunks=2, placement="v"),
    _schedule(
        "message-driven zero-bubble V, 6 in flight",
        name="message-driven-zero-bubble",
        chunks=2,
        placement="v",
        in_flight_limit=6,
    ),
)
OVER_A_LINK = (OURS[0], OURS[1], OURS[-2], OURS[-1])
"""Those that are compared over slow links too."""
ONE_F_ONE_B = Contender("PyTorch 1F1B", "pytorch/1f1b")
ZBV = Contender("PyTorch ZBV", "pytorch/zbv")


OTHERS = (ONE_F_ONE_B, ZBV)


@dataclass(frozen=True)
class Jitter:
    """Sleeps after layers: up to twice `fraction` of what is computed up to there, drawn anew for each microbatch.

    `after`: seconds of forward and backward, by the layer that the sleep comes after.
    """

    fraction: float
    after: dict[str, tuple[float, float]]
    seed: int = 1

    @classmethod
    def of(cls, workload: str, forward: float, backward: float, fraction: float = 0.1) -> Jitter:
        """At the ends of the quarters of the network, so that all contenders sleep as long whatever their cuts.

        `forward` and `backward` are those of half of the network.
        """
        model = GPT(validate(config_of(workload, {}), TrainConfig, where=workload).model)
        costs = [layer.cost for layer in model.layers]
        quarters = virtual_spans(model, ChunkLayout(stages=2, chunks=2, placement="v"))
        shares = [sum(costs[i] for i in span) / sum(costs) for span in quarters]
        after = {
            model.layers[span.stop - 1].name: (2 * share * forward, 2 * share * backward)
            for span, share in zip(quarters, shares, strict=True)
        }
        return cls(fraction, after)


@dataclass(frozen=True)
class Paired:
    """Seconds and loss of each round by contender, in the contenders' order."""

    times: list[list[float]]
    losses: list[list[float]]
    memory: list[dict[str, int] | None]
    """What our contenders say of rank 0's memory."""
    tails: list[list[float]]
    """Seconds of each round from the last task of the pipeline to the end of the batch, on rank 0; only with spans."""
    overlaps: list[list[Overlap]] = field(default_factory=list)
    """Of each round, mean over ranks; only of ours, and with spans."""
    sent_bytes: list[float | None] = field(default_factory=list)
    """What rank 0 sends in the collectives of one batch, where that is counted."""

    def ratio(self, over: int, under: int = 0) -> float:
        """Median over the rounds of contender `under`'s time divided by contender `over`'s."""
        return median(paired_ratios(self.times[under], self.times[over]))

    def tail_ratio(self, over: int, under: int = 0) -> float:
        """As `ratio`, of what comes after the pipeline."""
        return median(paired_ratios(self.tails[under], self.tails[over]))

    def seconds(self, contender: int) -> float:
        return median(self.times[contender])

    @property
    def loss_difference(self) -> float:
        """Largest relative difference of any loss from the first contender's; infinite where one is not finite."""
        return max(difference(losses, self.losses[0]) or 0.0 for losses in self.losses)

    def check_losses(self, tolerance: float = SAME_WORK) -> None:
        """Losses before times: only equal work may be compared. Exits when they differ."""
        if self.loss_difference > tolerance:
            sys.exit(f"losses differ by {self.loss_difference:.1e}: the times may not be compared")


def run_paired(
    workload: str,
    contenders: Sequence[Contender],
    *,
    grid: Mapping[str, int],
    rounds: int,
    link_rate: str | None = None,
    jitter: Jitter | None = None,
    copies: int = 1,
    spans: bool = False,
) -> Paired:
    """Let contenders train in turn in the same ranks, on `grid` or others of as many ranks.

    `link_rate` (as tc writes it) puts a slow link between them. With `copies` of the whole run at once, the times of
    all are put together. `spans` (of ours) cost a little time.
    """
    ranks = prod(grid.values())
    spec = {
        "contenders": [[c.framework, config_of(workload, grid) | dict(c.options)] for c in contenders],
        "rounds": rounds,
        "jitter": None if jitter is None else vars(jitter),
        "spans": spans,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "spec.json").write_text(json.dumps(spec))
        runs = [_start(folder, copy, ranks, link_rate) for copy in range(copies)]
        failed = [copy for copy, run in enumerate(runs) if run.wait()]
        if failed:
            sys.exit(f"the ranks failed:\n{(folder / f'log-{failed[0]}.txt').read_text()[-3000:]}")
        found = [json.loads((folder / f"out-{copy}.json").read_text()) for copy in range(copies)]
    times, tails_of = (
        [[t for one in found for t in one[name][i]] for i in range(len(contenders))] for name in ("times", "tails")
    )
    overlaps = [[Overlap(*o) for one in found for o in one["overlaps"][i]] for i in range(len(contenders))]
    return Paired(times, found[0]["losses"], found[0]["memory"], tails_of, overlaps, found[0]["sent_bytes"])


def _start(folder: Path, copy: int, ranks: int, link_rate: str | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.bench.paired", str(folder / "spec.json"), str(folder / f"out-{copy}.json")]
    env = rank_environment(os.environ)
    if ranks > 1:
        own_cores = ranks <= available_cores()
        command = mpiexec_command(ranks, command, link_only=link_rate is not None, own_cores=own_cores)
    if link_rate is not None:
        command = ["unshare", "-n", "bash", str(ROOT / "tools" / "slownet.sh"), *command]
        env["RATE"] = link_rate
    with (folder / f"log-{copy}.txt").open("w") as log:
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)
