"""Comparison of published configurations with the planner's best on the same machine and batch, part by part.

`python -m experiments.planning.plan_compare [experiments/fig6.yaml]` (or `make plan-published`) prints a table for each
framework's point and writes results/predicted/plan-<experiment>.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.table import Table

from axonn.cli.console import make_console
from axonn.cli.doc_links import explained
from axonn.errors import ConfigError
from axonn.perf.planner.planner import PlannedStrategy, plan
from axonn.perf.planner.search_space import Space
from axonn.perf.prediction import PredictedBreakdown, Prediction, predict
from axonn.perf.strategy import Strategy
from axonn.training.places import from_here
from axonn.training.provenance import commit
from experiments.definition import HERE, OURS, PredictedPoint, find_machine, load_experiment, load_model, strategy_of
from experiments.planning.planning import TABLE_WIDTH, described, plannable
from experiments.predictor import PREDICTED

PARTS = tuple(field.name for field in fields(PredictedBreakdown))
"""Parts of a batch, as in `axonn.perf.prediction.PredictedBreakdown`."""


def row_of(name: str, strategy: Strategy, prediction: Prediction) -> dict[str, Any]:
    """Return one row of the result."""
    return {
        "configuration": name,
        "strategy": strategy.model_dump(mode="json"),
        "batch_time_s": prediction.batch_time_s,
        "pct_peak": prediction.pct_peak,
        "memory_bytes": prediction.memory.total,
        "parts_s": {part: getattr(prediction.parts, part) for part in PARTS},
    }


def compared(point: PredictedPoint, published: PlannedStrategy, best: PlannedStrategy) -> dict[str, Any]:
    """Return both configurations of a point and their difference, part by part."""
    rows = [
        row_of(name, choice.strategy, choice.prediction)
        for name, choice in (("published", published), ("planned", best))
    ]
    return {
        "model": point.model,
        "gpus": point.gpus,
        "rows": rows,
        "speedup": published.seconds / best.seconds,
        "saved_s": {part: rows[0]["parts_s"][part] - rows[1]["parts_s"][part] for part in PARTS},
    }


def table(point: dict[str, Any]) -> Table:
    """Return the table of both configurations, part by part."""
    title = f"{point['model']} on {point['gpus']} GPUs: the plan is {point['speedup']:.2f}x as fast (both predicted)"
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "grid", "microbatch", "schedule", "checkpoints", "optimizer", "time s", "% of peak", "GB", *PARTS):
        result.add_column(name.replace("_", " "), justify="left" if name in ("", "grid", "schedule") else "right")
    for row in point["rows"]:
        cells = described(Strategy.model_validate(row["strategy"]))
        result.add_row(
            row["configuration"],
            *cells,
            f"{row['batch_time_s']:.1f}",
            f"{row['pct_peak']:.1f}",
            f"{row['memory_bytes'] / 1e9:.1f}",
            *(f"{seconds:.1f}" for seconds in row["parts_s"].values()),
        )
    result.add_row("saved", *[""] * 8, *(f"{seconds:.1f}" for seconds in point["saved_s"].values()))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare every AxoNN point of an experiment file with the planner's best."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.planning.plan_compare", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("experiment", nargs="?", default=str(HERE / "fig6.yaml"), help="its file; default that of fig6")
    path: str = parser.parse_args(arguments).experiment
    console = make_console()
    console.width = max(console.width, TABLE_WIDTH + 40)
    experiment = load_experiment(path)
    panel = experiment.predicted
    if panel is None:
        raise ConfigError(f"{path}: has no predicted points of its own")
    machine = find_machine(panel.machine)
    points = []
    for point in (p for p in panel.points if p.framework == OURS):
        model = load_model(point.model)
        strategy = strategy_of(panel, point, where=path)
        batch_size = point.batch_size or panel.batch_size
        published = predict(model, machine, strategy, batch_size=batch_size)
        space = Space(gpus=point.gpus, batch_size=batch_size, precision=strategy.compute)
        with console.status(f"planning {point.model} on {point.gpus} GPUs"):
            best = plan(plannable(model), machine, space, shown=1).best[0]
        points.append(compared(point, PlannedStrategy(strategy=strategy, prediction=published), best))
        console.print(table(points[-1]))
    out = PREDICTED / f"plan-{experiment.name}.json"
    content = {
        "kind": "predicted",
        "experiment": experiment.name,
        "machine": machine.name,
        "batch_size": panel.batch_size,
        "command": f"python -m experiments.planning.plan_compare {path}",
        "commit": commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "points": points,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {from_here(out)}", soft_wrap=True)


if __name__ == "__main__":
    with explained("docs/plan.md"):
        main()
