"""What an experiment file asks for is what the prediction assumes, what a job would run and what the record says.

Or the point is refused. The settings are those of the schema, one by one: a new one that nobody carries out fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from axonn.errors import AxonnError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import outline_of
from axonn.observability.records import Failure, Machine, Record, read_records, write_records
from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.planner import planner
from axonn.perf.planner.engine_strategy import as_the_engine, differences
from axonn.perf.prediction import Prediction, predict
from axonn.perf.strategy import Strategy
from axonn.training.framework import ClusterWork, PrintedRun, load_framework, ran_by
from axonn.training.run_outcome import Outcome
from axonn.training.run_record import run_record
from axonn.training.supervision.cluster_launch import spec_of
from experiments import predicted_case, predictor
from experiments.cluster_work import SmallWork, record_of
from experiments.definition import HERE, Experiment, find_machine, load_experiment
from experiments.planning import planned_points
from experiments.planning.planned_points import Plannable
from experiments.predicted_case import PredictedCase
from experiments.predictor import predict_experiment
from experiments.runner import measured_work
from jobscripts.collection import work_of
from jobscripts.generate import ClusterJob, _plain, write_jobs
from jobscripts.job_plan import plan_jobs
from jobscripts.launchers import load_launcher
from jobscripts.schedulers import load_scheduler
from jobscripts.system import FOLDER as SYSTEMS
from jobscripts.system import load_system
from tests.helpers.asked_for import STATED, AskedFor, asked_for, files_of_documents, leaves, model_settings, over
from tests.helpers.cluster_jobs import site

SMALL = GPTConfig(name="small", layers=2, hidden=64, heads=4, seq_len=16, vocab=64)
ONE = Strategy.model_validate({"grid": {}, "microbatch_size": 1})
MACHINES = sorted(path.stem for path in SYSTEMS.glob("*.yaml"))
SHIPPED = [path for path in sorted(HERE.glob("*.yaml")) if load_experiment(path).predicts]


@pytest.fixture
def assumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Prediction], tuple[ModelOutline, Strategy, int]]:
    """Of a prediction, what the performance model was asked for: predictions are all those of a small model, and the
    planner takes the first configuration that there is."""
    made: dict[int, tuple[Prediction, tuple[ModelOutline, Strategy, int]]] = {}

    def instead(
        outline: ModelOutline, machine: Any, strategy: Strategy, *, batch_size: int, **options: Any
    ) -> Prediction:
        prediction = predict(outline_of(SMALL), machine, ONE, batch_size=1, **options)
        made[id(prediction)] = prediction, (outline, strategy, batch_size)
        return prediction

    def first(model: Plannable, machine: Any, space: Any, **options: Any) -> planner.StrategyPlan:
        search = planner._Search(model, machine, space, lambda what, done, total: None)
        candidate = next(one for grid in space.grids() for one in search._candidates(grid))
        strategy = search.closed.strategy(candidate)
        choice = planner.PlannedStrategy(
            strategy=strategy, prediction=predict(outline_of(SMALL), machine, ONE, batch_size=1)
        )
        discarded = planner.Discarded()
        return planner.StrategyPlan(best=[choice], estimated=1, estimating_s=1.0, simulated=1, discarded=discarded)

    monkeypatch.setattr(predicted_case, "predict", instead)
    monkeypatch.setattr(planned_points, "plan", first)
    monkeypatch.setattr(predictor, "PREDICTED", tmp_path / "predicted")
    # Nothing is drawn here.
    monkeypatch.setattr(predictor, "_write_spans", lambda folder, prediction: None)
    return lambda prediction: made[id(prediction)][1]


@pytest.fixture(params=[*SHIPPED, "docs"], ids=lambda path: path if isinstance(path, str) else path.stem)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Experiment files that predict: one that is shipped, or those of the pages."""
    if isinstance(request.param, Path):
        return [request.param]
    # As long as paths get: names of jobs and records come from them.
    folder = tmp_path / "-".join(["a folder"] * 12)
    folder.mkdir()
    found = [path for path in files_of_documents(folder) if load_experiment(path).predicts]
    assert len(found) >= 2
    return found


def strategy_leaves(strategy: Strategy) -> dict[str, Any]:
    return leaves(strategy.model_dump(mode="json"))


def alike(asked: Any, found: Any) -> bool:
    return found == (list(asked) if isinstance(asked, tuple) else asked)


def differing(asked: AskedFor, found: dict[str, Any], *, known: bool = True) -> dict[str, tuple[Any, Any]]:
    """Settings that are otherwise than asked for; with `known` those, too, that are not said at all."""
    return {
        key: (value, found.get(key, "not said"))
        for key, value in asked.settings.items()
        if key not in asked.decided and (known or key in found) and not alike(value, found.get(key))
    }


def test_what_is_predicted_is_what_was_asked_for(
    files: list[Path],
    assumed: Callable[[Prediction], tuple[ModelOutline, Strategy, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[PredictedCase] = []

    def noted(*arguments: Any, **options: Any) -> PredictedCase:
        found.append(predicted_case.predict_case(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(predictor, "predict_case", noted)
    for path in files:
        found.clear()
        records = predict_experiment(load_experiment(path), command="test")
        for asked, case, record in zip(asked_for(path), found, records, strict=True):
            outline, strategy, batch_size = assumed(case.prediction)
            model = {f"model.{key}": value for key, value in leaves(case.case.model.model_dump(mode="json")).items()}
            said = strategy_leaves(strategy) | model | {"batch_size": batch_size, "gpus": case.case.gpus}
            assert differing(asked, said) == {}, asked.name
            assert outline == outline_of(case.case.model)
            assert_recorded(asked, record, said)


def assert_recorded(asked: AskedFor, record: Record, assumed: dict[str, Any]) -> None:
    """The record has each setting as it was asked for, and where it has one twice, both are the same."""
    assert differing(asked, record.settings) == {}, asked.name
    assert {key: value for key, value in assumed.items() if record.settings.get(key, "missing") != value} == {}
    work, ran = record.asked, record.ran
    twice: dict[str, Any] = {
        "model.name": work.model,
        "gpus": work.gpus,
        "batch_size": work.batch_size,
        "compute": work.precision,
        "microbatch_size": ran.microbatch_size,
        "overdecomposition": ran.overdecomposition,
        **{f"grid.{axis}": extent for axis, extent in ran.grid.extents().items()},
        **{f"schedule.{key}": value for key, value in (asdict(ran.schedule) if ran.schedule else {}).items()},
    }
    if "model.layers" in record.settings:
        twice |= {f"model.{key}": getattr(work, key) for key in ("seq_len", "layers", "hidden", "vocab")}
    assert {key: (value, record.settings[key]) for key, value in twice.items() if record.settings[key] != value} == {}
    assert ran.framework == asked.framework


def points_of(path: Path) -> Iterator[tuple[AskedFor, Experiment]]:
    """Each point with an experiment that has it alone."""
    experiment = load_experiment(path)
    for number, asked in enumerate(asked_for(path)):
        panel = experiment.predicted
        if panel is None:
            yield asked, experiment
            continue
        alone = panel.model_copy(update={"points": [panel.points[number]]})
        yield asked, experiment.model_copy(update={"predicted": alone})


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.usefixtures("assumed")
def test_a_job_runs_what_was_asked_for_or_there_is_none(files: list[Path], machine: str, tmp_path: Path) -> None:
    jobs = 0
    for path in files:
        if load_experiment(path).predicted is None:
            # Of a data set all points at once.
            by_point = {(job.work.name, job.framework): job for job in jobs_of(load_experiment(path), machine)}
            pairs = [(a, by_point.get((a.name, a.framework))) for a in asked_for(path)]
        else:
            pairs = [(asked, next(iter(jobs_of(alone, machine)), None)) for asked, alone in points_of(path)]
        for asked, job in pairs:
            if job is not None:
                jobs += 1
                assert_run(asked, job, machine, tmp_path / f"jobs-{jobs}")
    own = {find_machine(m).name for path in files if (m := machine_of(load_experiment(path)))}
    assert jobs or machine not in own, "every point is refused on the experiment's own machine"


def machine_of(experiment: Experiment) -> str:
    return predictor.points_to_predict(experiment)[0]


def jobs_of(experiment: Experiment, machine: str) -> list[ClusterJob]:
    """Empty where all of it is refused, with a reason."""
    try:
        return plan_jobs(experiment, system=load_system(machine), site=site()).jobs
    except AxonnError as error:
        reason = str(error)
    assert len(reason) > 20
    return []


def assert_run(asked: AskedFor, job: ClusterJob, machine: str, folder: Path) -> None:
    """What the ranks are told, what stands in work.json and what a record of the run would say."""
    launch, work = job.launch, job.work
    assert isinstance(work, ClusterWork)
    stated = STATED[job.adapter](launch)
    unequal = differing(asked, stated, known=False)
    assert unequal == {}, f"{asked.name} {asked.framework} on {machine}"
    if job.adapter == "axonn":
        for key, value in asked.settings.items():
            # What the engine cannot be told it always does, or the notes say that it does otherwise.
            always = (
                key in stated
                or key in ("gpus", "checkpoint_layers")
                or not differences(
                    ONE.model_copy(update=as_the_engine(ONE).model_dump() | {"grid": work.strategy.grid, key: value})
                )
            )
            assert always or any(key in note for note in launch.notes), f"{key} {value!r}: {launch.notes}"
    system = load_system(machine)
    manifest = write_jobs(
        [job],
        folder,
        experiment="test",
        command="axonn jobs",
        system=system,
        site=site(),
        scheduler=load_scheduler(system.scheduler),
        launcher=load_launcher(system.launcher),
    )
    (entry,) = manifest.jobs
    again = work_of(folder / entry.name / "work.json", manifest, entry)
    assert isinstance(again, ClusterWork)
    run = PrintedRun(seconds=[1.0] * work.steps, finished=True)
    machine_said = Machine(name=machine)
    record = record_of(
        again, run, framework=job.framework, version="?", machine=machine_said, source="test", experiment="test"
    )
    assert_recorded(asked, record, {})
    assert record.settings["steps"] == work.steps


MEASURED = [path for path in sorted(HERE.glob("*.yaml")) if load_experiment(path).policy is not None]


def measured_settings(path: Path) -> dict[str, dict[str, Any]]:
    """By label, the keys that the runs of an experiment file ask for."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "measured" in content:
        panel = content["measured"]
        model = {f"model.{key}": panel[key] for key in ("hidden", "heads", "seq_len", "vocab")}
        own = {"microbatch_size": panel["microbatch_size"], "steps": panel["batches"], "seed": panel.get("seed", 0)}
        batch = panel["microbatch_size"] * max(panel["min_microbatches"], 2 * panel["microbatches_per_rank"])
        return {
            f"gpt-{panel['layers_per_rank'] * ranks}x{panel['hidden']}-{ranks}r": model
            | own
            | {"model.layers": panel["layers_per_rank"] * ranks, "grid.inter": ranks, "batch_size": batch}
            for ranks in (1, 2)
        }
    runs = content["runs"]
    found = {}
    for label, own in runs["runs"].items():
        asked = over(runs.get("defaults", {}), own or {})
        model = model_settings(asked.pop("model"))
        if isinstance(asked.get("precision"), str):
            asked["precision"] = {"compute": asked["precision"]}
        found[label] = leaves(asked) | model | {"steps": runs["batches"]}
    return found


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_what_is_measured_is_what_was_asked_for(path: Path, tmp_path: Path) -> None:
    """What the ranks are told, here and in a job, and what the record says; or the framework refuses it."""
    experiment, asked = load_experiment(path), measured_settings(path)
    work = measured_work(experiment, most=2)
    assert {label for label, _, _ in work} == set(asked)
    for label, config, name in work:
        framework = load_framework(name)
        if framework.unavailable(config) is not None:
            continue
        spec = json.loads(spec_of(name, config))
        small = json.loads(json.dumps(_plain(SmallWork(name=label, framework=name, config=config, warmup_batches=1))))
        ran = ran_by(framework, config)
        record = run_record(
            config,
            Outcome(failure=Failure(cause="error", detail="not run")),
            folder=tmp_path,
            warmup=1,
            ran=ran,
            experiment="test",
            point=label,
            machine=Machine(name="test"),
            source="test",
        )
        for key, value in asked[label].items():
            assert leaves(spec["config"])[key] == value, f"{label}: {key}"
            assert leaves(small["small"]["config"])[key] == value, f"{label}: {key}"
            assert record.settings.get(key, "not said") == value, f"{label} {name}: {key}"
        # What is stated twice is the same, and what was left open is what the ranks do.
        assert record.settings["overdecomposition"] == ran.overdecomposition is not None
        assert record.asked.precision == record.settings["precision.compute"]
        chosen = {} if ran.schedule is None else {f"schedule.{k}": v for k, v in asdict(ran.schedule).items()}
        assert {k: v for k, v in record.settings.items() if k.startswith("schedule.")} == chosen
        write_records(tmp_path / "record.json", [record])
        assert read_records(tmp_path / "record.json") == [record]
