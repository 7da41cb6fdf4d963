"""The `axonn` command."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from experiments.console import console, launched_once, progress_bar, unforced, warn
from experiments.pages import documented, explained, page_of
from experiments.places import from_here
from experiments.plan_command import plan
from experiments.run_command import predict, run
from experiments.train_command import export, train

_PAGES = "A page for each thing to do, with commands to copy: docs/index.md"
app = typer.Typer(
    help="AxoNN reproduction suite: run, predict and compare asynchronous hybrid-parallel training.",
    epilog=_PAGES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@documented("docs/own-machine.md")
def calibrate(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Machine file; default experiments/machines/local.yaml (of a GPU local-gpu.yaml) of the project, or "
            "where you stand; --machine local finds it."
        ),
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Ranks that compute together; default one per core.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Type to compute in, as in a training configuration; float32, on a GPU bfloat16.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Coarser grids of sizes, in less than a minute.")] = False,
    device: Annotated[str, typer.Option(help="What to measure: cpu, cuda (one GPU) or auto.")] = "cpu",
) -> None:
    """Measure this machine (kernels, messages, collectives, the host) and write a machine file for axonn predict."""
    from axonn.config import PrecisionConfig, validate
    from axonn.devices import device_type
    from experiments.busy_watch import BusyWatch
    from experiments.calibrate import LOCAL, LOCAL_GPU
    from experiments.calibrate import calibrate as measure

    launched_once()
    start = time.perf_counter()
    compute = None
    if precision is not None:
        compute = validate({"compute": precision}, PrecisionConfig, where="--precision").compute
    kind = device_type(device)
    watch = BusyWatch()
    with progress_bar() as progress:
        task = progress.add_task("starting", total=None)

        def on_part(part: str) -> None:
            progress.update(task, description=part)

        file = out or (LOCAL_GPU if kind == "cuda" else LOCAL)
        machine = measure(
            ranks=ranks,
            precision=compute,
            quick=quick,
            out=file,
            device=kind,
            on_part=on_part,
        )
    if warning := watch.warning():
        warn(warning)
    rate = machine.gpu.peak.si / 1e9
    console.print(
        f"{machine.node.gpus.number} rank(s), {rate:.1f} GFLOP/s each at best; written to {from_here(file)} "
        f"in {time.perf_counter() - start:.0f} s",
        soft_wrap=True,
    )


@documented("docs/compare.md")
def compare(
    records: Annotated[list[Path], typer.Argument(help="Record files, summaries, or folders of them")],
    to: Annotated[str, typer.Option(help="Framework that the others are compared with.")] = "AxoNN",
    fail_above: Annotated[
        float | None,
        typer.Option(help="Exit with 1 where it takes more than so many times as long as the fastest other framework."),
    ] = None,
    with_busy: Annotated[
        bool, typer.Option("--with-busy", help="Ratios also of what was measured while the machine was busy.")
    ] = False,
) -> None:
    """Show records side by side, with ratios; published, predicted and measured ones apart."""
    from experiments import compare_records

    lines = compare_records.compare(compare_records.load(records), to, with_busy=with_busy)
    console.print(compare_records.table_of(lines, to))
    for line in lines:
        if line.failure is not None:
            console.print(f"[red]{escape(line.work)}, {line.framework}: {escape(line.failure)}[/red]", soft_wrap=True)
    if busy := sum(line.busy for line in lines):
        how = "in ratios all the same" if with_busy else "left out of ratios (--with-busy takes them in)"
        console.print(
            f"[yellow]{busy} measured while the machine was busy with other work, marked (busy): {how}; measure them "
            "anew when it is idle[/yellow]",
            soft_wrap=True,
        )
    if fail_above is None:
        return
    slower = compare_records.behind(lines, fail_above)
    for text in slower:
        console.print(f"[red]{to} falls behind: {escape(text)}[/red]", soft_wrap=True)
    if slower:
        raise typer.Exit(1)
    console.print(f"{to} takes at most {fail_above:g} times as long as the fastest other framework", soft_wrap=True)


@documented("docs/errors.md")
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
    for name, value in _gpus():
        table.add_row(name, value)
    for name in adapter_names():
        found = load_adapter(name).capabilities()
        if found.version is None:
            problems.append(f"framework {name}: {found.reason}")
            continue
        table.add_row(f"framework {name}", escape(found.version))
    for what, place in _places():
        table.add_row(what, escape(str(place)))
    console.print(table)
    for problem in problems:
        console.print(f"[yellow]will not work: {escape(problem)}[/yellow]", soft_wrap=True)


def _places() -> list[tuple[str, Path]]:
    """Where commands look, and where they write if nothing else is said."""
    from experiments import calibrate, places, runner

    return [
        ("the suite's own files", places.ROOT),
        ("named files, from", Path.cwd()),
        ("runs of axonn train", places.RUNS.absolute()),
        ("runs of experiments", runner.RUNS),
        ("results", runner.MEASURED.parent),
        ("figures", places.PROJECT / "plots" / "out"),
        ("this machine, measured", calibrate.LOCAL),
    ]


def _gpus() -> list[tuple[str, str]]:
    """What there is to say of the GPUs."""
    import torch

    from experiments.provenance import this_machine

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    said = [("GPUs", str(count))]
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        said.append((f"GPU {number}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if count:
        driver = this_machine(device="cuda").driver or "unknown"
        said.append(("CUDA", f"{torch.version.cuda or torch.version.hip}, driver {driver}"))
        nccl = "over NCCL" if torch.distributed.is_nccl_available() else "over host memory, since there is no NCCL"
        said.append(("ranks on GPUs", f"up to {count} with a GPU each {nccl}; more share them, over host memory"))
    return said


def commands() -> dict[str, Callable[..., None]]:
    """All commands by name: ours, and those of what stands above the experiments, which import nothing of it."""
    ours = {one.__name__: one for one in (plan, run, predict, train, export, calibrate, compare, doctor)}
    found = sorted(entry_points(group="axonn.commands"), key=lambda entry: entry.name)
    return ours | {entry.name: entry.load() for entry in found}


def _explained(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with its errors and interruptions explained: typer would end every interruption with 130."""

    @wraps(command)
    def run(*arguments: object, **options: object) -> None:
        with explained(page_of(command)):
            command(*arguments, **options)

    return run


for name, command in commands().items():
    app.command(name, epilog=f"More in {page_of(command)}")(_explained(command))


def main() -> None:
    """Entry point: errors of the suite become one message and its page and exit code 2, an interruption 128 + the
    number of its signal."""
    unforced()
    with explained():
        app()


if __name__ == "__main__":
    main()
