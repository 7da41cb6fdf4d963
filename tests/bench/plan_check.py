"""Whether the plan is good: the planner's choice for 2 ranks beside an exhaustive measured search (make validate-plan).

A listed space of grids, microbatches, schedules and checkpointing is measured with the real engine, in turn in the same
ranks, a few at a time and always the same one beside them. Then the planner's choice (of all that it searches, listed
or not) and the best of the list are measured again, alternating. The ratio of those two is the result;
results/local/plan.json has it, with every number.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from axonn.config.train_config import PrecisionConfig, TrainConfig
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.optim.algorithms.adamw import AdamWConfig
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.planner.engine_strategy import config_of_strategy, strategy_of_config
from axonn.perf.planner.planner import plan
from axonn.perf.planner.search_space import Space
from axonn.perf.prediction import predict
from axonn.schedules import ScheduleSpec
from axonn.training.provenance import commit
from experiments.definition import find_machine
from experiments.planning.planning import described, plannable
from tests.bench.report import make_console
from tests.bench.workloads import Contender, run_paired

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "results" / "local" / "plan.json"
RANKS = 2
ROUNDS, CONFIRMING, LAUNCHES = 3, 10, 4
BOUND = 1.05
"""The planner's choice may take so much longer than the best of the list."""
MODEL = GPTConfig(name="plan-check", layers=6, hidden=256, heads=4, seq_len=128, vocab=2048)
TINY = GPTConfig(name="plan-check-tiny", layers=4, hidden=32, heads=4, seq_len=16, vocab=256)
BATCH = 32

Grid = dict[str, int]


def listed(model: GPTConfig) -> list[TrainConfig]:
    """The space: everything that a user would try by hand."""
    found: list[TrainConfig] = []

    def add(grid: Grid, size: int, blocks: int | None = None, **schedule: Any) -> None:
        found.append(
            TrainConfig(
                model=model,
                grid=ProcessGrid(**grid),
                batch_size=BATCH,
                microbatch_size=size,
                schedule=ScheduleSpec(**schedule),
                activation_checkpointing=blocks,
            )
        )

    for size in (2, 4, 8, 16):
        add({"data": 2}, size)
    for size in (2, 4, 8):
        add({"inter": 2}, size)
        add({"inter": 2}, size, name="1f1b")
        add({"inter": 2}, size, name="zero-bubble")
    for size in (4, 8, 16):
        add({"row": 2}, size)
        add({"col": 2}, size)
    for axis in ("data", "inter", "row", "col"):
        add({axis: 2}, 4, 1)
    return found


def planned(model: GPTConfig, machine: MachineFile) -> TrainConfig:
    """What the planner chooses of all that it searches."""
    space = Space(gpus=RANKS, batch_size=BATCH, precision="float32")
    best = plan(plannable(model), machine, space, shown=1).best[0]
    return config_of_strategy(best.strategy, model, batch_size=BATCH)


def as_measured(config: TrainConfig) -> TrainConfig:
    """With what does not matter to two that compute alike set alike."""
    strategy = strategy_of_config(config)
    if strategy.optimizer == "device":
        config = config.model_copy(update={"optimizer": AdamWConfig()})
    if strategy.grid.inter == 1:
        config = config.model_copy(update={"schedule": ScheduleSpec()})
    sub_shards = {"overdecomposition": strategy.overdecomposition}
    return config.model_copy(update={**sub_shards, "precision": PrecisionConfig()})


def measure(configs: Sequence[TrainConfig], rounds: int) -> list[list[float]]:
    """Seconds of each round, by configuration, all in turn in the same ranks."""
    contenders = [
        Contender(str(number), options=config.model_dump(mode="json", exclude_defaults=True))
        for number, config in enumerate(configs)
    ]
    paired = run_paired("tiny", contenders, grid={"data": RANKS}, rounds=rounds)
    paired.check_losses()
    return paired.times


def together(config: TrainConfig) -> tuple[ProcessGrid, int]:
    """Those with equal ones may be measured in the same ranks: pipelines there share a transport, whose messages must
    have one size."""
    return config.grid, config.microbatch_size if config.grid.inter > 1 else 0


def measure_all(configs: Sequence[TrainConfig], rounds: int) -> list[float]:
    """Seconds of each. The first one runs beside all others, and its median sets the scale."""
    groups: dict[tuple[ProcessGrid, int], list[TrainConfig]] = {}
    for config in configs:
        groups.setdefault(together(config), []).append(config)
    ratios: dict[TrainConfig, float] = {}
    scale: list[float] = []
    for group in groups.values():
        reference, *times = measure([configs[0], *group], rounds)
        scale += reference
        for config, mine in zip(group, times, strict=True):
            ratios[config] = median(a / b for a, b in zip(mine, reference, strict=True))
    return [ratios[config] * median(scale) for config in configs]


def confirm(choice: TrainConfig, best: TrainConfig, rounds: int) -> list[list[float]]:
    """Both, alternating: batch by batch, or launch by launch where they cannot share ranks."""
    if 1 in (choice.grid.inter, best.grid.inter) or together(choice) == together(best):
        return measure([choice, best], rounds)
    times: list[list[float]] = [[], []]
    for _ in range(LAUNCHES):
        for number, config in enumerate((choice, best)):
            times[number] += measure([config], max(1, rounds // LAUNCHES))[0]
    return times


def check(model: GPTConfig, machine: MachineFile, *, rounds: int, confirming: int) -> dict[str, Any]:
    """The whole of it, as it is written to the result."""
    choice = as_measured(planned(model, machine))
    configs = [as_measured(config) for config in listed(model)]
    if choice not in configs:
        configs.append(choice)
    measured = measure_all(configs, rounds)
    predicted = [predict(model, machine, strategy_of_config(c), batch_size=BATCH).batch_time_s for c in configs]
    rows = [
        {
            "configuration": described(strategy_of_config(config)),
            "listed": number < len(listed(model)),
            "chosen": config == choice,
            "measured_s": measured[number],
            "predicted_s": predicted[number],
        }
        for number, config in enumerate(configs)
    ]
    best = configs[min(range(len(configs)), key=measured.__getitem__)]
    ratio, pairs = 1.0, []
    if best != choice:
        pairs = confirm(choice, best, confirming)
        ratio = median(a / b for a, b in zip(*pairs, strict=True))
    return {
        "kind": "measured",
        "model": model.model_dump(mode="json"),
        "batch_size": BATCH,
        "ranks": RANKS,
        "machine": machine.name,
        "rows": rows,
        "choice_over_best": ratio,
        "confirming_rounds_s": pairs,
        "bound": BOUND,
        "reached": ratio <= BOUND,
        "command": "python -m tests.bench.plan_check",
        "commit": commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(result: dict[str, Any]) -> Table:
    """All configurations, fastest measured first."""
    title = (
        f"{result['model']['name']} on {RANKS} ranks, batch {BATCH}: measured, and predicted for {result['machine']}"
    )
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("grid", "microbatch", "schedule", "checkpoints", "optimizer", "measured s", "predicted s", ""):
        found.add_column(name, no_wrap=True)
    for row in sorted(result["rows"], key=lambda row: row["measured_s"]):
        seconds = f"{row['measured_s']:.3f}", f"{row['predicted_s']:.3f}"
        found.add_row(*row["configuration"], *seconds, "the planner's" if row["chosen"] else "")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", default="local", help="machine file of this machine (axonn calibrate makes it)")
    parser.add_argument("--quick", action="store_true", help="try the check itself; its times mean nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    sizes = {"rounds": 1, "confirming": 2} if given.quick else {"rounds": ROUNDS, "confirming": CONFIRMING}
    result = check(TINY if given.quick else MODEL, find_machine(given.machine), **sizes)
    console = make_console()
    console.print(table(result))
    verdict = "reached" if result["reached"] else "missed"
    console.print(f"planner's choice over the best measured: {result['choice_over_best']:.3f} (<= {BOUND}: {verdict})")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {given.out}")
    sys.exit(0 if result["reached"] or given.quick else 1)


if __name__ == "__main__":
    main()
