"""Validation of predictions on this machine: `python -m experiments.validation.local_validation`.

Runs the configurations of experiments/calibration/validation.yaml with the suite's engine, some batches each, in
several rounds; calibrates before every round, since a machine's speed drifts; and predicts the same runs from the
machine files alone (the mean of their predictions). Nothing is fitted on these runs except the constant-GFLOP/s
predictor that is shown for comparison.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

import pandas as pd
from pydantic import Field
from rich.table import Table

from axonn.cli.console import make_console
from axonn.cli.doc_links import explained
from axonn.config.train_config import StrictModel, TrainConfig, load_yaml, read_yaml, validate
from axonn.errors import LaunchError
from axonn.observability.busy_watch import BusyWatch
from axonn.observability.procfs import available_cores
from axonn.observability.records import Execution, Record, Workload, write_records
from axonn.perf.machine.machine_file import MachineFile, load_machine
from axonn.perf.planner.engine_strategy import strategy_of_config
from axonn.perf.prediction import Prediction, predict
from axonn.perf.timing.constant_rate import naive_constant
from axonn.training.framework import load_framework, ran_by, settings_ran
from axonn.training.places import PROJECT, from_here
from axonn.training.provenance import this_machine
from axonn.training.run_record import parts_of
from axonn.training.supervision.supervisor import supervise
from experiments.calibration.measure_machine import calibrate
from experiments.definition import HERE

RUNS_FILE = HERE / "calibration" / "validation.yaml"
RESULT = PROJECT / "results" / "local" / "validation.json"
FOLDER = PROJECT / "runs" / "validate-local"
_NAME = "local"


class LocalRuns(StrictModel):
    """Configurations of the runs: `defaults`, overridden by the keys of each. All runs are repeated `rounds` times."""

    rounds: int = Field(ge=1)
    warmup_batches: int = Field(ge=1)
    defaults: dict[str, Any]
    runs: dict[str, dict[str, Any]]

    def configs(self) -> dict[str, TrainConfig]:
        """Return the complete configurations by name. Raises `ConfigError` naming the run."""
        return {
            name: validate(_completed(self.defaults, keys), TrainConfig, where=f"{RUNS_FILE.name}: {name}")
            for name, keys in self.runs.items()
        }


def _completed(defaults: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    model = keys.get("model", {})
    if isinstance(model, str):
        model = read_yaml(HERE / "models" / f"{model}.yaml")
    else:
        model = {**defaults["model"], **model}
        model.setdefault("name", f"gpt-{model['layers']}x{model['hidden']}")
    return {**defaults, **keys, "model": model}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One run, measured and predicted, in seconds of a batch."""

    name: str
    config: TrainConfig
    batches: tuple[float, ...]
    """Batches without those that warm up in each round."""
    measured: float
    predictions: tuple[Prediction, ...]
    """Predictions, one from each calibration."""
    constant: float
    """Prediction by the constant rate that fits these runs best."""

    @property
    def predicted(self) -> float:
        """Mean of the predictions."""
        return mean(prediction.batch_time_s for prediction in self.predictions)

    @property
    def error_pct(self) -> float:
        """Error of the prediction, percent of the measurement."""
        return 100 * (self.predicted / self.measured - 1)

    @property
    def constant_error_pct(self) -> float:
        """Error of the constant-rate prediction, percent of the measurement."""
        return 100 * (self.constant / self.measured - 1)


def ranks_of(config: TrainConfig) -> int:
    """Return the number of ranks of the grid."""
    return config.grid.size


def measure_round(
    configs: Mapping[str, TrainConfig], warmup: int, on_run: Callable[[str], None]
) -> dict[str, list[float]]:
    """Return the batch times of every run, without warm-up. Raises `LaunchError` for a run that fails."""
    times: dict[str, list[float]] = {}
    for name, config in configs.items():
        on_run(name)
        outcome = supervise("axonn", config, folder_of(name), timeout_s=120)
        if outcome.failure is not None:
            raise LaunchError(f"{name}: {outcome.failure.detail}; see {from_here(folder_of(name))}/log.txt")
        times[name] = outcome.batch_times_s[warmup:]
    return times


def folder_of(name: str) -> Path:
    """Return the run folder of a run."""
    return FOLDER / "".join(c if c.isalnum() else "-" for c in name)


def compare(
    configs: Mapping[str, TrainConfig], times: Mapping[str, Sequence[float]], machines: Sequence[MachineFile]
) -> list[Compared]:
    """Return the medians of the measured batches, with the predictions of the performance model."""
    flops = {
        n: Workload.of(c.model, gpus=1, batch_size=c.batch_size, precision="").flops(recompute=False)
        for n, c in configs.items()
    }
    rate = naive_constant([(flops[n], ranks_of(c), median(times[n])) for n, c in configs.items()])
    return [
        Compared(
            name=name,
            config=config,
            batches=tuple(times[name]),
            measured=median(times[name]),
            predictions=tuple(
                predict(config.model, machine, strategy_of_config(config), batch_size=config.batch_size)
                for machine in machines
            ),
            constant=flops[name] / ranks_of(config) / rate,
        )
        for name, config in configs.items()
    ]


def records_of(compared: Sequence[Compared], runs: LocalRuns, source: str) -> list[Record]:
    """Return a measured and a predicted record of each run."""
    return [record for one in compared for record in _records(one, runs, source)]


def _records(one: Compared, runs: LocalRuns, source: str) -> tuple[Record, Record]:
    config = one.config
    ranks = ranks_of(config)
    asked = Workload.of(config.model, gpus=ranks, batch_size=config.batch_size, precision=config.precision.compute)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    ran = ran_by(load_framework("axonn"), config)
    common: dict[str, Any] = {
        "settings": settings_ran(config, ran),
        "experiment": _NAME,
        "point": one.name,
        "asked": asked,
        "machine": this_machine(),
        "created": created,
    }
    tflop = asked.flops(recompute=False) / ranks / 1e12
    formula = config.model.flops_formula(recompute=False)
    folder = folder_of(one.name)
    measured = Record(
        kind="measured",
        ran=ran,
        source=source,
        batch_time_s=one.measured,
        batch_times_s=list(one.batches),
        parts_s=parts_of(folder, config, first=runs.warmup_batches, last=config.steps),
        tflops_formula=formula,
        tflops_per_gpu_without_recompute=tflop / one.measured,
        note=f"median of {len(one.batches)} batches in {runs.rounds} rounds; the parts are of the last round",
        run_folder=str(folder.relative_to(PROJECT)),
        **common,
    )
    parts = [prediction.parts for prediction in one.predictions]
    predicted = Record(
        kind="predicted",
        ran=Execution(**{**ran.model_dump(), "version": "performance model"}),
        source=source,
        batch_time_s=one.predicted,
        parts_s={name: mean(getattr(p, name) for p in parts) for name in parts[0].__dataclass_fields__},
        tflops_formula=formula,
        tflops_per_gpu_without_recompute=tflop / one.predicted,
        note=f"mean of {len(parts)} predictions, each from a calibration of its own",
        **common,
    )
    return measured, predicted


def table_of(compared: Sequence[Compared]) -> Table:
    """Return the table of measured, predicted, error, and the constant-rate predictor."""
    table = Table(title="a batch on this machine, ms", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(("run", "measured", "predicted", "error", "constant", "error")):
        table.add_column(name, justify="right" if i else "left")
    for one in compared:
        table.add_row(
            one.name,
            f"{1e3 * one.measured:.1f}",
            f"{1e3 * one.predicted:.1f}",
            f"{one.error_pct:+.1f}%",
            f"{1e3 * one.constant:.1f}",
            f"{one.constant_error_pct:+.1f}%",
        )
    return table


def summary_of(compared: Sequence[Compared]) -> dict[str, float]:
    """Return mean and largest |error| in percent, rank correlation, and the mean of the constant-rate predictor."""
    errors = [abs(one.error_pct) for one in compared]
    measured = pd.Series([one.measured for one in compared])
    predicted = pd.Series([one.predicted for one in compared])
    return {
        "mean_pct": mean(errors),
        "max_pct": max(errors),
        "rank_correlation": float(measured.rank().corr(predicted.rank())),
        "constant_mean_pct": mean(abs(one.constant_error_pct) for one in compared),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.validation.local_validation", description=__doc__)
    parser.add_argument("--machine", type=Path, help="machine file to use; default: calibrate before every turn")
    parser.add_argument("--runs", type=Path, default=RUNS_FILE, help="the runs")
    parser.add_argument("--only", default="", help="only runs whose name has this in it")
    options = parser.parse_args(arguments)
    console = make_console()
    runs = load_yaml(options.runs, LocalRuns)
    configs = {n: c for n, c in runs.configs().items() if options.only in n and ranks_of(c) <= available_cores()}
    times: dict[str, list[float]] = {name: [] for name in configs}
    watch = BusyWatch()
    machines: list[MachineFile] = [] if options.machine is None else [load_machine(options.machine)]
    with console.status("starting") as status:
        for turn in range(1, runs.rounds + 1):

            def report(step: str, turn: int = turn) -> None:
                status.update(f"turn {turn} of {runs.rounds}: {step}")

            if options.machine is None:
                machines.append(calibrate(on_part=report))
            for name, batches in measure_round(configs, runs.warmup_batches, report).items():
                times[name] += batches
    compared = compare(configs, times, machines)
    command = " ".join(
        ["python -m experiments.validation.local_validation", *(sys.argv[1:] if arguments is None else arguments)]
    )
    write_records(RESULT, records_of(compared, runs, command))
    console.print(table_of(compared))
    summary = summary_of(compared)
    console.print(
        f"{len(compared)} runs: mean error {summary['mean_pct']:.1f}%, largest {summary['max_pct']:.1f}%, "
        f"rank correlation {summary['rank_correlation']:.3f}; constant rate, fitted on these runs: mean error "
        f"{summary['constant_mean_pct']:.1f}%; written to {from_here(RESULT)}",
        soft_wrap=True,
    )
    if warning := watch.warning():
        console.print(f"[yellow]{warning}[/yellow]", soft_wrap=True)


if __name__ == "__main__":
    with explained("docs/own-machine.md"):
        main()
