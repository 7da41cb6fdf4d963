"""The commands `axonn run` and `axonn predict`, which measure and predict the points of an experiment."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from axonn.cli.console import (
    ExperimentFile,
    command_line,
    console,
    launched_once,
    options_left,
    progress_bar,
    say_defaults,
    warn,
)
from axonn.cli.doc_links import documented
from axonn.errors import AxonnError, RunFailed
from axonn.training.places import from_here

if TYPE_CHECKING:
    from axonn.observability.records import Record
    from axonn.perf.timing.jitter import Jitter
    from experiments.definition import Experiment
    from experiments.runner import MeasuredPoint


@documented("docs/own-figure.md")
def run(  # noqa: PLR0917
    experiment_file: ExperimentFile,
    list_points: Annotated[bool, typer.Option("--list", help="List the points and whether they are done.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and run nothing.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Keep points that are done, or measure all anew.")
    ] = True,
    timeout: Annotated[float, typer.Option(help="Seconds after which a point is given up.")] = 3600.0,
    fresh_busy: Annotated[
        bool, typer.Option("--fresh-busy", help="Measure anew what was measured while the machine was busy.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="What to compute on: cpu, which the points are sized for, cuda or auto.")
    ] = "cpu",
) -> None:
    """Measure the points of an experiment on this machine. What is done is kept; an interrupted run can be resumed.

    A point that was measured while the machine was busy with other work is done, and marked.
    """
    from axonn.device.devices import device_type
    from experiments.definition import load_experiment
    from experiments.runner import points_of

    experiment = load_experiment(experiment_file)
    if experiment.policy is None:
        console.print(f"nothing to measure: {experiment_file} has neither measured nor runs", soft_wrap=True)
        return
    points = points_of(experiment, device_type(device))
    if not (list_points or dry_run):
        launched_once()
    done = {
        p.name: r for p in points if resume and (r := p.finished_record()) is not None and not (fresh_busy and r.busy)
    }
    if list_points or dry_run:
        _list(points, done)
        return
    if not resume or fresh_busy:
        # A fresh measurement that is interrupted then resumes where it was, and does not mix with the old one.
        for point in points:
            if point.name not in done:
                point.record_file.unlink(missing_ok=True)
    if all(p.name in done for p in points):
        newest = max(r.created or "" for r in done.values())
        console.print(f"nothing to do: {len(points)} measured points, newest of {newest}; --fresh measures anew")
    else:
        unavailable, failures = _measure(experiment, points, done, timeout_s=timeout)
        _conclude(experiment, points, done, unavailable, failures)
    _say_busy(done.values(), experiment_file)


def _list(points: Sequence[MeasuredPoint], done: Mapping[str, Record]) -> None:
    for point in points:
        state = "to do" if point.name not in done else "busy" if done[point.name].busy else "done"
        console.print(f"{state:6} {point.name}: {point.ranks} rank(s), {point.config.steps} batches", soft_wrap=True)


def _measure(
    experiment: Experiment, points: Sequence[MeasuredPoint], done: dict[str, Record], *, timeout_s: float
) -> tuple[dict[str, Record], int]:
    """Measure the points that are not `done` and add their records there; return the records of unavailable frameworks,
    by point and framework, and the number of failures."""
    from experiments.runner import run_point

    failures = 0
    width = max(len(p.label) for p in points)
    unavailable: dict[str, Record] = {}
    with progress_bar() as progress:
        all_points = progress.add_task(f"measuring {experiment.name}", total=len(points), completed=len(done))
        for point in [p for p in points if p.name not in done]:
            one = progress.add_task(f"  {point.label} {point.framework}", total=point.config.steps)
            record = run_point(
                point,
                command=command_line(),
                on_batch=lambda n, task=one: progress.update(task, completed=n),  # type: ignore[misc]
                on_warning=warn,
                timeout_s=timeout_s,
            )
            progress.remove_task(one)
            progress.advance(all_points)
            if record.failure is not None and record.failure.cause == "unavailable":
                unavailable[f"{point.label} {record.ran.framework}"] = record
                continue
            if record.failure is None:
                done[point.name] = record
            else:
                failures += 1
            _print_measured(point, record, width)
    return unavailable, failures


def _print_measured(point: MeasuredPoint, record: Record, width: int) -> None:
    if record.failure is None:
        console.print(
            f"{point.label:>{width}} {record.ran.framework:14} {record.batch_time_s:8.3f} s per batch, "
            f"loss {record.losses[-1]:.4f}" + (" (machine busy)" if record.busy else "")
        )
        return
    console.print(
        f"[red]{point.label} {record.ran.framework} failed ({record.failure.cause}): "
        f"{escape(record.failure.detail)}; see {from_here(point.folder)}/log.txt[/red]",
        soft_wrap=True,
    )


def _conclude(
    experiment: Experiment,
    points: Sequence[MeasuredPoint],
    done: Mapping[str, Record],
    unavailable: Mapping[str, Record],
    failures: int,
) -> None:
    """Compare losses and print the result. Raises `RunFailed` for failed points and `AxonnError` if none could run."""
    from experiments.missing_frameworks import how_to_install, not_installed
    from experiments.runner import compare_losses

    assert experiment.policy is not None
    tolerance = experiment.policy.loss_tolerance
    for name, record in unavailable.items():
        assert record.failure is not None
        console.print(f"[yellow]not run: {name}: {escape(record.failure.detail)}[/yellow]", soft_wrap=True)
    if experiment.runs is not None:
        # No other framework could take its place.
        failures += len(unavailable)
    ordered = [(p, done[p.name]) for p in points if p.name in done]
    for record in compare_losses(ordered, tolerance):
        failures += 1
        assert record.failure is not None
        console.print(f"[red]{record.point} {record.ran.framework}: {record.failure.detail}[/red]", soft_wrap=True)
    if failures:
        raise RunFailed(f"{failures} of {len(points)} points failed; run again to repeat them alone")
    if not ordered:
        raise AxonnError("none of the points can run here")
    console.print(
        f"{len(ordered)} of {len(points)} points measured; losses of the same work agree within {tolerance:g} "
        "(relative)"
    )
    if line := how_to_install(not_installed(unavailable.values())):
        console.print(f"[yellow]{escape(line)}[/yellow]", soft_wrap=True)


def _say_busy(records: Iterable[Record], experiment_file: Path) -> None:
    """Print the points that were measured on a busy machine, and what to do about them."""
    busy = [r for r in records if r.busy]
    if busy:
        most = max(r.busy_share or 0.0 for r in busy)
        names = ", ".join(dict.fromkeys(f"{r.point} {r.ran.framework}" for r in busy))
        console.print(
            f"[yellow]{len(busy)} of them measured while the machine was busy with other work (others took up to "
            f"{most:.0%} of the cores): {escape(names)}; when it is idle, measure these anew: "
            f"axonn run {escape(str(experiment_file))} --fresh-busy[/yellow]",
            soft_wrap=True,
        )


@documented("docs/own-figure.md")
def predict(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Experiment file; with --validate: data sets of experiments/validation, by default all"),
    ] = None,
    *,
    validate: Annotated[
        bool, typer.Option("--validate", help="Hold the model against published measurements instead.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Predict anew even if nothing has changed.")] = False,
    jitter: Annotated[
        float | None,
        typer.Option(help="Tasks and messages take random times with this relative deviation, for instance 0.1."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Batches that are simulated with --jitter.")] = 5,
    spans: Annotated[Path | None, typer.Option(help="Folder for what each stage does when, point by point.")] = None,
) -> None:
    """Predict the points of an experiment at the published scale, or hold predictions against published sets."""
    from axonn.perf.timing.jitter import Jitter

    if validate:
        _validate(names or [], fresh=fresh)
    elif names is None or len(names) != 1:
        raise AxonnError("give one experiment file, for instance experiments/fig6.yaml, or --validate")
    else:
        noise = None if jitter is None else Jitter(relative=jitter, repeats=seeds)
        if noise is not None and "seeds" in options_left(context):
            say_defaults([f"{seeds} batches are simulated (--seeds)"])
        _predict_experiment(Path(names[0]), fresh=fresh or spans is not None, jitter=noise, spans=spans)


def _validate(names: list[str], *, fresh: bool) -> None:
    from experiments.validation import validation_tables as tables
    from experiments.validation.published_sets import find_data_sets
    from experiments.validation.validate import (
        done_validation,
        fingerprint_of,
        points_of,
        result_file,
        validate_set,
        write_validation,
    )

    paths = find_data_sets(names)
    file = result_file(names)
    validation = None if fresh else done_validation(paths, result=file)
    results = [] if validation is None else validation.sets
    if validation is None:
        with progress_bar() as progress:
            task = progress.add_task("predicting", total=sum(map(points_of, paths)))

            def on_point(label: str) -> None:
                progress.update(task, description=label, advance=1)

            results = [validate_set(path, on_point=on_point) for path in paths]
    for result in results:
        console.print(tables.set_table(result))
        for line in tables.remarks(result):
            console.print(escape(line), highlight=False)
        if result.variants:
            console.print(tables.variant_table(result))
            for letter, meaning in tables.variant_names(result)[1:]:
                console.print(f"{letter}: {escape(meaning)}", highlight=False)
    console.print(tables.summary_table(results))
    if any(result.goals for result in results):
        console.print(tables.goal_table(results))
    if validation is not None:
        console.print(tables.fitted_table(validation.fitted))
        console.print(f"nothing to do: {from_here(file)} was written on {validation.created}", soft_wrap=True)
        return
    validation = write_validation(results, command=command_line(), path=file, mark=fingerprint_of(paths))
    console.print(tables.fitted_table(validation.fitted))
    console.print(f"written to {from_here(file)}", soft_wrap=True)


def _predict_experiment(experiment_file: Path, *, fresh: bool, jitter: Jitter | None, spans: Path | None) -> None:
    from experiments.definition import load_experiment, strategies_by_default
    from experiments.predictor import done_predictions, points_to_predict, predict_experiment

    experiment = load_experiment(experiment_file)
    if not experiment.predicts:
        console.print(f"nothing to predict: {experiment_file} has neither predicted nor data_set", soft_wrap=True)
        return
    records = None if fresh else done_predictions(experiment, jitter)
    if records is not None:
        _show_spread(records)
        say_defaults(strategies_by_default(experiment))
        console.print(f"nothing to do: {len(records)} points were predicted on {records[0].created}")
        return
    start = time.perf_counter()
    with progress_bar() as progress:
        task = progress.add_task("predicting", total=len(points_to_predict(experiment)[1]))
        count = 0

        def on_point(name: str) -> None:
            nonlocal count
            progress.update(task, description=f"predicting {name}", completed=count)
            count += 1

        records = predict_experiment(experiment, command=command_line(), on_point=on_point, jitter=jitter, spans=spans)
        progress.update(task, description="predicted", completed=len(records))
    _show_spread(records)
    say_defaults(strategies_by_default(experiment))
    console.print(f"{len(records)} points predicted in {time.perf_counter() - start:.1f} s")


def _show_spread(records: Sequence[Record]) -> None:
    """Print the spread of batch times, if the records have the times of several batches."""
    from experiments.validation.validation_tables import spread_table

    if all(record.batch_times_s for record in records):
        console.print(spread_table(records))
