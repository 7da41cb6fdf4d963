"""The `axonn` command."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from axonn.errors import AxonnError
from experiments.plan_command import plan

if TYPE_CHECKING:
    from axonn.perf.jitter import Jitter
    from axonn.records import Record

app = typer.Typer(
    help="AxoNN reproduction suite: run, predict and compare asynchronous hybrid-parallel training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
ExperimentFile = Annotated[Path, typer.Argument(help="Experiment file, for instance experiments/fig6.yaml")]


app.command()(plan)


def _command() -> str:
    return shlex.join(["axonn", *sys.argv[1:]])


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _launched_once() -> None:
    """Raise `LaunchError` when a launcher started this command several times: it starts the ranks itself."""
    from axonn.errors import LaunchError
    from axonn.runtime import launched_as

    # A batch script under Slurm has the variables of its whole job, and is run once all the same.
    copies = launched_as({k: v for k, v in os.environ.items() if not k.startswith("SLURM_")})[1]
    if copies > 1:
        raise LaunchError(
            f"the command was launched {copies} times, but starts the ranks of its grids itself; "
            "run it once, without mpiexec"
        )


@app.command()
def run(
    experiment_file: ExperimentFile,
    list_points: Annotated[bool, typer.Option("--list", help="List the points and whether they are done.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and run nothing.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Keep points that are done, or measure all anew.")
    ] = True,
    timeout: Annotated[float, typer.Option(help="Seconds after which a point is given up.")] = 3600.0,
) -> None:
    """Measure the points of an experiment on this machine. What is done is kept; an interrupted run can be resumed."""
    from experiments.definition import load_experiment
    from experiments.runner import compare_losses, points_of, run_point

    experiment = load_experiment(experiment_file)
    points = points_of(experiment)
    if not (list_points or dry_run):
        _launched_once()
    done = {p.name: r for p in points if resume and (r := p.finished_record()) is not None}
    if list_points or dry_run:
        for point in points:
            state = "done" if point.name in done else "to do"
            console.print(
                f"{state:6} {point.name}: {point.ranks} rank(s), {point.config.steps} batches", soft_wrap=True
            )
        return
    if not resume:
        # So that a fresh measurement which is interrupted goes on where it was, and does not mix with the old one.
        for point in points:
            point.record_file.unlink(missing_ok=True)
    missing = [p for p in points if p.name not in done]
    if not missing:
        newest = max(r.created or "" for r in done.values())
        console.print(f"nothing to do: {len(points)} measured points, newest of {newest}; --fresh measures anew")
        return
    failures = 0
    without: dict[str, str] = {}
    with _progress() as progress:
        all_points = progress.add_task(f"measuring {experiment.name}", total=len(points), completed=len(done))
        for point in missing:
            one = progress.add_task(f"  {point.work} {point.framework}", total=point.config.steps)
            record = run_point(
                point,
                command=_command(),
                on_batch=lambda n, task=one: progress.update(task, completed=n),  # type: ignore[misc]
                timeout_s=timeout,
            )
            progress.remove_task(one)
            progress.advance(all_points)
            if record.failure is not None and record.failure.cause == "unavailable":
                without[f"{point.work} {record.ran.framework}"] = record.failure.detail
            elif record.failure is None:
                done[point.name] = record
                console.print(
                    f"{point.work:>16} {record.ran.framework:14} {record.batch_time_s:8.3f} s per batch, "
                    f"loss {record.losses[-1]:.4f}"
                )
            else:
                failures += 1
                console.print(
                    f"[red]{point.work} {record.ran.framework} failed ({record.failure.cause}): "
                    f"{escape(record.failure.detail)}; see {record.run_folder}/log.txt[/red]",
                    soft_wrap=True,
                )
    for name, reason in without.items():
        console.print(f"[yellow]not run: {name}: {escape(reason)}[/yellow]", soft_wrap=True)
    ordered = [(p, done[p.name]) for p in points if p.name in done]
    for record in compare_losses(ordered, experiment.measured.loss_tolerance):
        failures += 1
        assert record.failure is not None
        console.print(f"[red]{record.point} {record.ran.framework}: {record.failure.detail}[/red]", soft_wrap=True)
    if failures:
        raise AxonnError(f"{failures} of {len(points)} points failed; run again to repeat them alone")
    if not ordered:
        raise AxonnError("none of the points can run here")
    worst = experiment.measured.loss_tolerance
    console.print(
        f"{len(ordered)} of {len(points)} points measured; losses of all frameworks agree within {worst:g} (relative)"
    )


@app.command()
def predict(
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
    from axonn.perf.jitter import Jitter

    if validate:
        _validate(names or [])
    elif names is None or len(names) != 1:
        raise AxonnError("give one experiment file, for instance experiments/fig6.yaml, or --validate")
    else:
        noise = None if jitter is None else Jitter(relative=jitter, repeats=seeds)
        _predict_experiment(Path(names[0]), fresh=fresh or spans is not None, jitter=noise, spans=spans)


def _validate(names: list[str]) -> None:
    from experiments import validation_tables as tables
    from experiments.datasets import find_data_sets
    from experiments.validate import RESULT, points_of, validate_set, write_validation

    paths = find_data_sets(names)
    results = []
    with _progress() as progress:
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
    validation = write_validation(results, command=_command())
    console.print(tables.fitted_table(validation.fitted))
    console.print(f"written to {RESULT}", soft_wrap=True)


def _predict_experiment(experiment_file: Path, *, fresh: bool, jitter: Jitter | None, spans: Path | None) -> None:
    from experiments.definition import load_experiment
    from experiments.predictor import done_predictions, predict_experiment

    experiment = load_experiment(experiment_file)
    records = None if fresh else done_predictions(experiment, jitter)
    if records is not None:
        _show_spread(records)
        console.print(f"nothing to do: {len(records)} points were predicted on {records[0].created}")
        return
    start = time.perf_counter()
    with _progress() as progress:
        task = progress.add_task("predicting", total=len(experiment.predicted.points))
        count = 0

        def on_point(name: str) -> None:
            nonlocal count
            progress.update(task, description=f"predicting {name}", completed=count)
            count += 1

        records = predict_experiment(experiment, command=_command(), on_point=on_point, jitter=jitter, spans=spans)
        progress.update(task, description="predicted", completed=len(records))
    _show_spread(records)
    console.print(f"{len(records)} points predicted in {time.perf_counter() - start:.1f} s")


def _show_spread(records: Sequence[Record]) -> None:
    """Where the times are those of several batches."""
    from experiments.validation_tables import spread_table

    if all(record.batch_times_s for record in records):
        console.print(spread_table(records))


@app.command()
def calibrate(
    out: Annotated[
        Path | None, typer.Option(help="Machine file to write; default experiments/machines/local.yaml.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Ranks that compute together; default one per core.")] = None,
    precision: Annotated[str, typer.Option(help="Type to compute in, as in a training configuration.")] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="Coarser grids of sizes, in less than a minute.")] = False,
) -> None:
    """Measure this machine (kernels, messages, collectives, the host) and write a machine file for axonn predict."""
    from axonn.config import PrecisionConfig, validate
    from experiments.calibrate import LOCAL
    from experiments.calibrate import calibrate as measure

    _launched_once()
    start = time.perf_counter()
    compute = validate({"compute": precision}, PrecisionConfig, where="--precision").compute
    with _progress() as progress:
        task = progress.add_task("starting", total=None)

        def on_part(part: str) -> None:
            progress.update(task, description=part)

        file = out or LOCAL
        machine = measure(
            ranks=ranks,
            precision=compute,
            quick=quick,
            out=file,
            on_part=on_part,
        )
    rate = machine.gpu.peak.si / 1e9
    console.print(
        f"{machine.node.gpus.number} rank(s), {rate:.1f} GFLOP/s each at best; written to {file} "
        f"in {time.perf_counter() - start:.0f} s",
        soft_wrap=True,
    )


@app.command()
def train(
    config_file: Annotated[Path, typer.Argument(help="Training configuration (YAML)")],
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<name of the file>.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew, and remove the checkpoints of the run folder.")
    ] = False,
) -> None:
    """Train a model as a configuration says; goes on from the newest checkpoint of the run folder if there is one."""
    from axonn.config import TrainConfig, load_yaml
    from axonn.data import make_data
    from axonn.defaults import sub_shards
    from axonn.engine import microbatches_of
    from axonn.grid import ProcessGrid
    from axonn.inter_layer.stage import virtual_spans
    from axonn.models import make_model
    from axonn.schedules import make_schedule
    from experiments import training
    from experiments.progress import TrainingProgress
    from experiments.runner import RUNS

    config = training.resolved(load_yaml(config_file, TrainConfig))
    grid = ProcessGrid(**config.grid.model_dump())
    # Everything that can be wrong is found here, before ranks start.
    _launched_once()
    model = make_model(config.model)
    model.check(grid)
    sub_shards(config.overdecomposition, microbatch_size=config.microbatch_size, grid=grid)
    count = microbatches_of(batch_size=config.batch_size, microbatch_size=config.microbatch_size, grid=grid)
    schedule = make_schedule(config.schedule.spec(), stage=0, stages=grid.inter, microbatches=count)
    stages = virtual_spans(model, schedule.layout)
    data = make_data(config)
    folder = out or RUNS / config_file.stem
    session = training.prepare(config, folder, data=data, command=_command(), fresh=fresh, warn=_warn)
    console.print(
        f"{config.model.parameters / 1e6:.1f}M parameters, {grid.size} rank(s) ({grid}), {count} microbatch(es) per "
        f"pipeline, layers per chunk {[len(s) for s in stages]}, {data.summary}"
    )
    if session.resume is not None:
        if session.first >= config.steps:
            console.print(f"nothing to do: {session.first} batches are done; raise steps, or start anew with --fresh")
            return
        console.print(f"going on after batch {session.first} from {session.resume.folder}", soft_wrap=True)
    unit = config.model.sample_unit
    try:
        with TrainingProgress(console, folder, first=session.first, steps=config.steps, unit=unit) as progress:
            record = training.train(session, fresh=fresh, on_batch=progress)
    except KeyboardInterrupt:
        _say_how_to_go_on(folder)
        raise typer.Exit(130) from None
    if record.failure is not None:
        _say_how_to_go_on(folder)
        raise AxonnError(f"{record.failure.detail}; {len(record.losses)} batches are kept in {folder}")
    console.print(f"loss {record.losses[0]:.4f} -> {record.losses[-1]:.4f} in {len(record.losses)} batches; {folder}")
    console.print(_time_of(record.batch_time_s, record.parts_s), soft_wrap=True)
    if len(record.bytes_per_batch) > 1:
        console.print(_sent_by_axis(record.bytes_per_batch), soft_wrap=True, highlight=False)


def _warn(message: str) -> None:
    console.print(f"[yellow]warning: {escape(message)}[/yellow]", soft_wrap=True)


def _say_how_to_go_on(folder: Path) -> None:
    from axonn.checkpoint import latest
    from experiments.loop import CHECKPOINTS

    newest = latest(folder / CHECKPOINTS, read_all=False)
    how = (
        "there is no checkpoint: the next start begins anew (see the key 'checkpoints')"
        if newest is None
        else f"the newest checkpoint is of batch {newest.state.batches}; the same command goes on from there"
    )
    console.print(f"stopped; {how}", soft_wrap=True)


def _time_of(seconds: float | None, parts: Mapping[str, float]) -> str:
    """Where the time of a batch went, in one line."""
    total = sum(parts.values())
    shares = ", ".join(f"{name.replace('_', '-')} {part / total:.0%}" for name, part in parts.items() if part > 0)
    return f"{seconds:.3f} s per batch" + (f": {shares}" if shares else "")


def _sent_by_axis(sizes: Mapping[str, int]) -> str:
    """What a rank sends for a batch, in one line."""
    parts = ", ".join(f"{axis} {size:,}" for axis, size in sorted(sizes.items(), key=lambda item: -item[1]))
    return f"bytes sent per batch by a rank, at most: {parts}"


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Run folder (its newest checkpoint) or one checkpoint")],
    out: Annotated[Path, typer.Option(help="File to write, for instance model.safetensors")],
) -> None:
    """Write the master weights of a checkpoint as one safetensors file, for initial_weights or other programs."""
    from axonn.checkpoint import latest
    from axonn.errors import CheckpointError
    from axonn.weights import export_weights
    from experiments.loop import CHECKPOINTS

    checkpoint = source
    if not (source / "state.json").exists():
        found = latest(source / CHECKPOINTS, warn=_warn)
        if found is None:
            raise CheckpointError(f"{source}: is neither a checkpoint nor a run folder with a good one")
        checkpoint = found.folder
    count = export_weights(checkpoint, out)
    console.print(f"{count} parameters of {checkpoint} written to {out}", soft_wrap=True)


@app.command()
def compare(
    records: Annotated[list[Path], typer.Argument(help="Record files, summaries, or folders of them")],
    to: Annotated[str, typer.Option(help="Framework that the others are compared with.")] = "AxoNN",
    fail_above: Annotated[
        float | None,
        typer.Option(help="Exit with 1 where it takes more than so many times as long as the fastest other framework."),
    ] = None,
) -> None:
    """Show records side by side, with ratios; published, predicted and measured ones apart."""
    from experiments import compare_records

    lines = compare_records.compare(compare_records.load(records), to)
    console.print(compare_records.table_of(lines, to))
    for line in lines:
        if line.failure is not None:
            console.print(f"[red]{escape(line.work)}, {line.framework}: {escape(line.failure)}[/red]", soft_wrap=True)
    if fail_above is None:
        return
    slower = compare_records.behind(lines, fail_above)
    for text in slower:
        console.print(f"[red]{to} falls behind: {escape(text)}[/red]", soft_wrap=True)
    if slower:
        raise typer.Exit(1)
    console.print(f"{to} takes at most {fail_above:g} times as long as the fastest other framework", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what this machine has: ranks, MPI, GPUs, frameworks; what will not work, and why."""
    from axonn.errors import LaunchError
    from axonn.launch import find_mpiexec
    from axonn.transport.survey import survey
    from experiments.framework import adapter_names, load_adapter
    from experiments.provenance import this_machine

    machine = this_machine()
    table = Table(show_header=False, box=None)
    for name, value in machine.model_dump(exclude_none=True).items():
        table.add_row(name.replace("_", " "), str(value))
    problems = []
    try:
        table.add_row("mpiexec", find_mpiexec())
        import mpi4py

        table.add_row("mpi4py", mpi4py.__version__)
    except (LaunchError, ImportError) as error:
        problems.append(f"more than one rank: {error}")
    for finding in survey():
        if finding.works:
            table.add_row(f"transport {finding.transport}", escape(finding.text))
        else:
            problems.append(f"transport {finding.transport}: {finding.text}")
    import torch

    table.add_row("GPUs", str(torch.cuda.device_count()))
    if torch.cuda.is_available():
        problems.append("GPUs: the engine does not use them yet; it runs on the CPU")
    for name in adapter_names():
        found = load_adapter(name).capabilities()
        if found.version is None:
            problems.append(f"framework {name}: {found.reason}")
            continue
        table.add_row(f"framework {name}", escape(found.version))
    console.print(table)
    for problem in problems:
        console.print(f"[yellow]will not work: {escape(problem)}[/yellow]", soft_wrap=True)


def main() -> None:
    """Entry point: errors of the suite become one message and exit code 2, an interruption 130."""
    try:
        app()
    except AxonnError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; what is done is kept, run again to go on")
        sys.exit(130)
