"""Predicted points: the performance model on every point of an experiment, written as records."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from axonn.perf.predict import Prediction, predict
from axonn.perf.strategy import Strategy
from axonn.records import Asked, Machine, Ran, Record, read_records, write_records
from experiments.definition import (
    HERE,
    ROOT,
    Experiment,
    PredictedPoint,
    find_machine,
    load_model,
    strategy_of,
)
from experiments.provenance import commit, fingerprint, sources

PREDICTED = ROOT / "results" / "predicted"


def predicted_file(experiment: Experiment) -> Path:
    return PREDICTED / f"{experiment.name}.json"


def fingerprint_of(experiment: Experiment) -> str:
    """Hash of the experiment, the machine, the models and the code that predicts."""
    return fingerprint(
        experiment.predicted.model_dump(mode="json"),
        sources(
            "axonn/perf/*.py",
            "axonn/schedules/*.py",
            "axonn/config.py",
            "axonn/grid.py",
            f"experiments/machines/{experiment.predicted.machine}.yaml",
            *(f"experiments/models/{p.model}.yaml" for p in experiment.predicted.points),
        ),
    )


def done_predictions(experiment: Experiment) -> list[Record] | None:
    """The records of an earlier call, if nothing has changed since."""
    path = predicted_file(experiment)
    if not path.exists():
        return None
    records = read_records(path)
    return records if records and records[0].fingerprint == fingerprint_of(experiment) else None


def predict_experiment(
    experiment: Experiment, *, command: str, on_point: Callable[[str], None] = lambda name: None
) -> list[Record]:
    """Predict every point and write the records. `on_point` is called with the name of each point before it starts."""
    panel = experiment.predicted
    machine = find_machine(panel.machine)
    mark = fingerprint_of(experiment)
    records = []
    for point in panel.points:
        on_point(f"{point.framework} {point.model} on {point.gpus} GPUs")
        strategy = strategy_of(panel, point, where=str(HERE / f"{experiment.name}.yaml"))
        strategy.process_grid(machine).check_world(point.gpus)
        prediction = predict(load_model(point.model), machine, strategy, batch_size=panel.batch_size)
        records.append(_record(experiment, point, strategy, prediction, command=command, mark=mark))
    write_records(predicted_file(experiment), records)
    return records


def _record(
    experiment: Experiment,
    point: PredictedPoint,
    strategy: Strategy,
    prediction: Prediction,
    *,
    command: str,
    mark: str,
) -> Record:
    panel = experiment.predicted
    parts = prediction.parts
    needs = prediction.memory.total
    return Record(
        kind="predicted",
        experiment=experiment.name,
        point=f"{point.model}-{point.gpus}",
        asked=Asked.of(
            load_model(point.model), gpus=point.gpus, batch_size=panel.batch_size, precision=panel.precision
        ),
        ran=Ran(
            framework=point.framework,
            version="performance model",
            grid=strategy.grid,
            microbatch_size=strategy.microbatch_size,
            schedule=strategy.schedule,
            microbatches=prediction.microbatches,
        ),
        machine=Machine(name=panel.machine, commit=commit()),
        source=command,
        batch_time_s=prediction.batch_time_s,
        parts_s={name: getattr(parts, name) for name in parts.__dataclass_fields__},
        memory_bytes=int(needs),
        tflops_per_gpu=prediction.tflops_per_gpu,
        tflops_formula="96bslh^2(1+s/6h+V/16lh) (with recompute)",
        pct_peak=prediction.pct_peak,
        fingerprint=mark,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        note=None if prediction.fits else f"needs {needs / 1e9:.1f} GB per GPU, more than the device has",
    )
