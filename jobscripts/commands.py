"""The commands `axonn jobs`, `axonn submit`, `axonn status` and `axonn collect`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from axonn.cli.console import ExperimentFile, command_line, console, progress_bar, warn
from axonn.cli.doc_links import documented
from axonn.errors import ConfigError
from axonn.training.places import from_here

if TYPE_CHECKING:
    from experiments.definition import Experiment
    from jobscripts.job_plan import JobPlan
    from jobscripts.site import Site
    from jobscripts.system import System

JobFolder = Annotated[Path, typer.Argument(help="Folder that axonn jobs wrote")]


@documented("docs/jobs.md")
def jobs(
    experiment_file: ExperimentFile,
    *,
    machine: Annotated[str, typer.Option(help="A machine of jobscripts/systems, or a file like these.")],
    small: Annotated[bool, typer.Option("--small", help="What the experiment measures on one machine.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the jobs; default ./jobs/EXPERIMENT-MACHINE.")] = None,
    site: Annotated[Path | None, typer.Option(help="Site file: account, queue, wall time, modules, paths.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Batches of each run; default 11, as published.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Jobs of each point; figures take the median.")] = 1,
    framework: Annotated[list[str] | None, typer.Option(help="Only this framework, by its label.")] = None,
    templates: Annotated[Path | None, typer.Option(help="Folder with changed copies of jobscripts/templates.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be asked for, and write nothing.")] = False,
) -> None:
    """Write a job script for each point of an experiment, checked against the machine first."""
    from experiments.cluster_work import PUBLISHED_STEPS
    from experiments.definition import load_experiment
    from jobscripts.generate import write_jobs
    from jobscripts.launchers import load_launcher
    from jobscripts.schedulers import load_scheduler
    from jobscripts.site import load_site
    from jobscripts.system import load_system

    if small and steps is not None:
        raise ConfigError("--steps is for points at the published scale; the experiment's file has it for --small")
    system, user = load_system(machine), load_site(site)
    experiment = load_experiment(experiment_file)
    scheduler = load_scheduler(user.scheduler or system.scheduler)
    launcher = load_launcher(user.launcher or system.launcher)
    where = str(site or "there is no --site file")
    if not dry_run:
        user.require(system.needs, where=where, machine=system.machine)
    planned = _planned(
        experiment,
        system,
        user,
        small=small,
        steps=steps or PUBLISHED_STEPS,
        repeats=repeats,
        only=framework or [],
    )
    _show(planned, system, user, notes=dry_run)
    if dry_run:
        return
    planned.require(user, where=where)
    folder = out or Path("jobs") / f"{experiment.name}-{system.machine}"
    write_jobs(
        planned.jobs,
        folder,
        experiment=experiment.name,
        command=command_line(),
        system=system,
        site=user,
        scheduler=scheduler,
        launcher=launcher,
        templates=templates,
    )
    console.print("What differs from the published runs, or must be provided, is under notes in each work.json.")
    console.print(
        f"{len(planned.jobs)} jobs written to {folder}; submit them with: axonn submit {folder}", soft_wrap=True
    )


def _planned(
    experiment: Experiment, system: System, site: Site, *, small: bool, steps: int, repeats: int, only: Sequence[str]
) -> JobPlan:
    """Plan the jobs under a progress bar."""
    from jobscripts.job_plan import plan_jobs, plan_small_jobs

    with progress_bar(transient=True) as progress:
        task = progress.add_task("checking", total=None)
        if small:
            return plan_small_jobs(experiment, system=system, site=site, repeats=repeats, only=only)
        return plan_jobs(
            experiment,
            system=system,
            site=site,
            steps=steps,
            repeats=repeats,
            only=only,
            on_point=lambda name: progress.update(task, description=f"checking {name}"),
        )


def _show(planned: JobPlan, system: System, site: Site, *, notes: bool) -> None:
    """Print the jobs, warnings, the points without a job, and by request the notes of each framework."""
    console.print(_table(planned))
    ended = [] if system.ended is None else [f"{system.machine} takes no jobs any more: {system.ended}"]
    for line in [*ended, *planned.warnings, *site.missing(system.provide)]:
        console.print(f"[yellow]warning: {escape(line)}[/yellow]", soft_wrap=True)
    for line in planned.left_out_lines():
        console.print(f"[yellow]no job: {escape(line)}[/yellow]", soft_wrap=True)
    if notes:
        for framework, lines in planned.notes().items():
            for line in lines:
                console.print(f"{escape(framework)}: {escape(line)}", soft_wrap=True)


def _table(planned: JobPlan) -> Table:
    from jobscripts.job_plan import node_hours

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # Names are shown in full, since axonn submit --only takes them.
    table.add_column("job", overflow="fold")
    for name in ("ranks", "GPUs", "nodes", "node-hours\nat most"):
        table.add_column(name, justify="right", no_wrap=True)
    for framework in dict.fromkeys(job.framework for job in planned.jobs):
        table.add_row(f"[bold]{escape(framework)}[/bold]")
        for job in planned.jobs:
            r = job.resources
            if job.framework == framework:
                gpus = r.nodes * r.gpus_per_node
                table.add_row(escape(job.name), str(r.ranks), str(gpus), str(r.nodes), f"{r.node_hours:.1f}")
    table.add_section()
    table.add_row("all", "", "", "", f"{node_hours(planned.jobs):.1f}")
    return table


@documented("docs/jobs.md")
def submit(
    folder: JobFolder,
    only: Annotated[list[str] | None, typer.Option(help="Only this job, by its name.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Finished jobs, too.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be submitted, and submit nothing.")
    ] = False,
) -> None:
    """Submit the jobs of a folder: those that have not finished, do not wait and do not run."""
    from jobscripts import submission

    if dry_run:
        names = submission.to_submit(folder, only=only or [], again=again)
        for name in names:
            console.print(name, soft_wrap=True)
        console.print(f"{len(names)} would be submitted" if names else "nothing to submit")
        return
    done = submission.submit(
        folder, only=only or [], again=again, on_job=lambda name, job: console.print(f"{name}: {job}", soft_wrap=True)
    )
    more = f"{len(done)} submitted; axonn status {folder} shows them"
    console.print(more if done else "nothing to submit", soft_wrap=True)


@documented("docs/jobs.md")
def status(
    folder: JobFolder,
    wait: Annotated[bool, typer.Option("--wait", help="Until no job waits or runs.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between questions to the scheduler.")] = 30.0,
) -> None:
    """Show the states of the jobs of a folder; exit status 1 when one that was submitted ended and is not complete."""
    from jobscripts.job_status import changes, table
    from jobscripts.submission import standings

    jobs = standings(folder)
    if wait:
        for newest, lines in changes(folder, every=every):
            jobs = newest
            for line in lines:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(table(folder, jobs))
    if silence := next((one.silence for one in jobs if one.silence is not None), None):
        warn(f"{silence}: shown is what the jobs left in their folders")
    if any(one.failed for one in jobs):
        raise typer.Exit(1)


@documented("docs/jobs.md")
def collect(folder: JobFolder) -> None:
    """Write records of the jobs of a folder that ended into results/measured of the project, for figures to show.

    Exit status 1 when a job could not be read; the others are collected all the same.
    """
    from experiments.runner import MEASURED
    from jobscripts.collection import collect as records_of

    collected = records_of(folder, results=MEASURED, command=command_line())
    for one in collected:
        record = one.record
        if record is None:
            text, colour = one.why, "red" if one.broken else ""
        elif record.failure is not None:
            text, colour = f"{record.failure.cause}: {record.failure.detail}", "red"
            text += "; the results keep the time of an earlier run" if one.hidden else ""
        else:
            text, colour = f"{record.batch_time_s:.3f} s per batch", ""
        console.print(f"{one.entry.name}: {text}", style=colour, markup=False, highlight=False, soft_wrap=True)
    count = sum(one.record is not None for one in collected)
    console.print(f"{count} of {len(collected)} jobs have a record in {from_here(MEASURED)}", soft_wrap=True)
    if any(one.broken for one in collected):
        raise typer.Exit(1)
