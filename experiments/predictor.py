"""Predicted points: the performance model on every point of an experiment, written as records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from axonn.perf.jitter import Jitter
from axonn.perf.outline import outline_of
from axonn.perf.predict import Prediction, predict
from axonn.perf.sent import bytes_by_axis
from axonn.perf.strategy import Strategy
from axonn.records import Asked, Machine, Ran, Record, read_records, write_records
from axonn.trace import SpanRecorder
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


def fingerprint_of(experiment: Experiment, jitter: Jitter | None = None) -> str:
    """Hash of the experiment, the jitter, the machine, the models and the code that predicts."""
    return fingerprint(
        experiment.predicted.model_dump(mode="json") | ({} if jitter is None else {"jitter": asdict(jitter)}),
        sources(
            "axonn/perf/*.py",
            "axonn/schedules/*.py",
            "axonn/config.py",
            "axonn/grid.py",
            "axonn/partition.py",
            "axonn/records.py",
            "axonn/unet_config.py",
            f"experiments/machines/{experiment.predicted.machine}.yaml",
            *(f"experiments/models/{p.model}.yaml" for p in experiment.predicted.points),
        ),
    )


def done_predictions(experiment: Experiment, jitter: Jitter | None = None) -> list[Record] | None:
    """The records of an earlier call, if nothing has changed since."""
    path = predicted_file(experiment)
    if not path.exists():
        return None
    records = read_records(path)
    return records if records and records[0].fingerprint == fingerprint_of(experiment, jitter) else None


def predict_experiment(
    experiment: Experiment,
    *,
    command: str,
    on_point: Callable[[str], None] = lambda name: None,
    jitter: Jitter | None = None,
    spans: Path | None = None,
) -> list[Record]:
    """Predict every point and write the records. `on_point` is called with the name of each point before it starts.

    With `jitter` a record has the time of every simulated batch, and its batch time is their mean. `spans`: a folder
    to write what each stage does when to, one run folder per point, as `axonn train` leaves it.
    """
    panel = experiment.predicted
    machine = find_machine(panel.machine)
    mark = fingerprint_of(experiment, jitter)
    records = []
    for point in panel.points:
        on_point(f"{point.framework} {point.model} on {point.gpus} GPUs")
        strategy = strategy_of(panel, point, where=str(HERE / f"{experiment.name}.yaml"))
        strategy.process_grid(machine).check_world(point.gpus)
        model = load_model(point.model)
        strategy.check(model)
        outline = outline_of(model)
        size = panel.batch_size
        prediction = predict(outline, machine, strategy, batch_size=size, record=spans is not None, jitter=jitter)
        record = _record(experiment, point, strategy, prediction, command=command, mark=mark)
        update: dict[str, Any] = {"bytes_per_batch": bytes_by_axis(outline, strategy, batch_size=size)}
        if prediction.spread is not None:
            times = list(prediction.spread.batch_times_s)
            update |= {"batch_time_s": prediction.spread.mean, "batch_times_s": times, "warmup_batches": 0}
        if spans is not None:
            folder = spans / f"{record.point}-{point.framework}"
            _write_spans(folder, prediction)
            update["run_folder"] = str(folder)
        records.append(record.model_copy(update=update))
    write_records(predicted_file(experiment), records)
    return records


def _write_spans(folder: Path, prediction: Prediction) -> None:
    """One folder per stage, as a rank's `SpanRecorder` fills it."""
    for stage in range(len(prediction.stages)):
        recorder = SpanRecorder(stage, folder=folder / f"spans-{stage}.parquet")
        recorder.spans = prediction.spans(only=stage)
        recorder.flush()


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
