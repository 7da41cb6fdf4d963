"""Predicted points: the performance model runs on every point of an experiment, and writes records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from axonn.errors import ConfigError, RecordError
from axonn.observability.records import Execution, Machine, Record, Workload, read_records, settings_of, write_records
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.prediction import Prediction
from axonn.perf.timing.bytes_sent import bytes_by_axis
from axonn.perf.timing.jitter import Jitter
from axonn.spans import SpanRecorder, overlap
from axonn.training.places import PROJECT, in_project
from axonn.training.provenance import commit, fingerprint, source_files
from experiments.definition import HERE, OURS, Experiment, find_machine, slug
from experiments.predicted_case import PredictedCase, predict_case
from experiments.validation.published_sets import FOLDER, Case, Open, case_of, load_data_set, rules_for

PREDICTED = PROJECT / "results" / "predicted"


@dataclass(frozen=True, kw_only=True)
class PointToPredict:
    """A point for the performance model.

    `name`: the point's name in records, the same in its published, predicted and measured one. `where`: its file.
    `planned`: whether the planner chooses the fields that the case's strategy leaves open.
    """

    name: str
    framework: str
    case: Case
    rules: Sequence[Open]
    where: str
    planned: bool = False


def points_to_predict(experiment: Experiment) -> tuple[str, list[PointToPredict]]:
    """Return the machine, and the points of an experiment or of the data set that it names, in order.

    Raises `ConfigError` where there are none.
    """
    if experiment.data_set is not None:
        path = FOLDER / f"{experiment.data_set}.yaml"
        data, cases = load_data_set(path)
        return data.machine, [
            PointToPredict(
                name=case.label,
                framework=case.group or OURS,
                case=case,
                rules=rules_for(data, case),
                where=str(path),
            )
            for case in cases
        ]
    panel = experiment.predicted
    if panel is None:
        raise ConfigError(
            f"experiments/{experiment.name}.yaml has nothing to predict; give it predicted, or a data_set"
        )
    return panel.machine, [
        PointToPredict(
            name=point.name,
            framework=point.framework,
            case=case_of(panel, point),
            rules=(),
            where=str(HERE / f"{experiment.name}.yaml"),
            planned=point.framework in panel.planned,
        )
        for point in panel.points
    ]


def predicted_file(experiment: Experiment) -> Path:
    """Return the file of an experiment's predicted records."""
    return PREDICTED / f"{experiment.name}.json"


def fingerprint_of(experiment: Experiment, jitter: Jitter | None = None) -> str:
    """Return a hash of the points, the jitter, the machine, the models and the code that predicts."""
    machine, points = points_to_predict(experiment)
    plain = [
        {
            "name": p.name,
            "framework": p.framework,
            "gpus": p.case.gpus,
            "batch_size": p.case.batch_size,
            "model": p.case.model.model_dump(mode="json"),
            "strategy": p.case.strategy,
            "rules": [rule.model_dump(mode="json") for rule in p.rules],
        }
        | ({"planned": True} if p.planned else {})
        for p in points
    ]
    return fingerprint(
        {
            "points": plain,
            "spans": experiment.spans,
            "machine": find_machine(machine).model_dump(mode="json"),
        }
        | ({} if jitter is None else {"jitter": asdict(jitter)}),
        source_files(__name__),
    )


def done_predictions(experiment: Experiment, jitter: Jitter | None = None) -> list[Record] | None:
    """Return the records of an earlier call if nothing has changed since, otherwise None."""
    path = predicted_file(experiment)
    if not path.exists():
        return None
    try:
        records = read_records(path)
    except RecordError:
        # Another schema, or a damaged file: counts as absent.
        return None
    if not records or records[0].fingerprint != fingerprint_of(experiment, jitter):
        return None
    missing = experiment.spans and not all(r.run_folder and (PROJECT / r.run_folder).exists() for r in records)
    return None if missing else records


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
    for the spans of each stage, one run folder per point, as `axonn train` writes it; an experiment that needs spans
    has one next to its records. Raises `ConfigError` naming a point that cannot be predicted.
    """
    name, points = points_to_predict(experiment)
    machine = find_machine(name)
    mark = fingerprint_of(experiment, jitter)
    if spans is None and experiment.spans:
        spans = PREDICTED / experiment.name
    records = []
    for point in points:
        on_point(f"{point.framework} {point.case.model.name} on {point.case.gpus} GPUs")
        case, choice = decided(point, machine)
        predicted = predict_case(
            case, machine, where=point.where, rules=point.rules, record=spans is not None, jitter=jitter
        )
        predicted = replace(predicted, chosen=[*choice, *predicted.chosen])
        record = _record(experiment, point, predicted, machine=name, command=command, mark=mark)
        prediction = predicted.prediction
        update: dict[str, Any] = {}
        if prediction.spread is not None:
            times = list(prediction.spread.batch_times_s)
            update |= {"batch_time_s": prediction.spread.mean, "batch_times_s": times, "warmup_batches": 0}
        if spans is not None:
            folder = spans / slug(f"{point.name}-{point.framework}")
            _write_spans(folder, prediction)
            update["run_folder"] = in_project(folder.absolute())
            if experiment.spans:
                update["overlap_s"] = overlap(prediction.spans())._asdict()
        records.append(record.model_copy(update=update))
    write_records(predicted_file(experiment), records)
    return records


def decided(point: PointToPredict, machine: MachineFile) -> tuple[Case, list[str]]:
    """Return the case with its complete strategy, and the planner's notes where that chose."""
    if not point.planned:
        return point.case, []
    # The planner reads models of the engine, and so needs torch, which predictions alone do not.
    from experiments.planning.planned_points import planned

    case = point.case
    choice = planned(case.model, machine, case.strategy, gpus=case.gpus, batch_size=case.batch_size, where=point.where)
    return replace(case, strategy=choice.strategy.model_dump(mode="json")), choice.notes


def _write_spans(folder: Path, prediction: Prediction) -> None:
    """Write one folder of spans per stage, as a rank's `SpanRecorder` does."""
    for stage in range(len(prediction.stages)):
        recorder = SpanRecorder(stage, folder=folder / f"spans-{stage}.parquet")
        recorder.spans = prediction.spans(only=stage)
        recorder.flush()


def _record(
    experiment: Experiment, point: PointToPredict, predicted: PredictedCase, *, machine: str, command: str, mark: str
) -> Record:
    case, strategy, prediction = predicted.case, predicted.strategy, predicted.prediction
    parts = prediction.parts
    needs = prediction.memory.total
    notes = [*predicted.chosen, *([] if prediction.fits else [f"needs {needs / 1e9:.1f} GB per GPU, more than it has"])]
    return Record(
        kind="predicted",
        experiment=experiment.name,
        point=point.name,
        asked=Workload.of(case.model, gpus=case.gpus, batch_size=case.batch_size, precision=strategy.compute),
        ran=Execution(
            framework=point.framework,
            version="performance model",
            grid=strategy.grid,
            microbatch_size=strategy.microbatch_size,
            overdecomposition=strategy.overdecomposition,
            schedule=strategy.schedule,
            microbatches=prediction.microbatches,
        ),
        settings=settings_of(strategy, model=case.model, batch_size=case.batch_size, gpus=case.gpus),
        machine=Machine(name=machine, commit=commit()),
        source=command,
        batch_time_s=prediction.batch_time_s,
        parts_s={name: getattr(parts, name) for name in parts.__dataclass_fields__},
        phases_s={
            "inter_layer": predicted.quantity("pipeline_s"),
            "all_reduce": predicted.quantity("all_reduce_s"),
            "optimizer": predicted.quantity("optimizer_s"),
        },
        memory_bytes=int(needs),
        memory_parts=prediction.memory_parts,
        memory_of_all=prediction.memory_of_all(case.gpus),
        bytes_per_batch=bytes_by_axis(predicted.outline, strategy, batch_size=case.batch_size),
        tflops_per_gpu=prediction.tflops_per_gpu,
        tflops_formula=case.model.flops_formula(recompute=strategy.recompute == "full"),
        pct_peak=prediction.pct_peak,
        fingerprint=mark,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        note="; ".join(notes) or None,
    )
