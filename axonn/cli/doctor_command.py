"""The command `axonn doctor`."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from axonn.cli.console import console
from axonn.cli.doc_links import documented


@documented("docs/errors.md")
def doctor() -> None:
    """Say what this machine has: ranks, MPI, GPUs, frameworks; what will not work, and why."""
    from axonn.distributed.launch import find_mpiexec
    from axonn.distributed.transport.diagnostics import diagnose
    from axonn.errors import LaunchError
    from axonn.training.framework import adapter_names, load_adapter
    from axonn.training.provenance import this_machine

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
    for finding in diagnose():
        if finding.works:
            table.add_row(f"transport {finding.transport}", escape(finding.text))
        else:
            problems.append(f"transport {finding.transport}: {finding.text}")
    for name, value in _gpus():
        table.add_row(name, value)
    for name in adapter_names():
        capabilities = load_adapter(name).capabilities()
        if capabilities.version is None:
            problems.append(f"framework {name}: {capabilities.reason}")
            continue
        table.add_row(f"framework {name}", escape(capabilities.version))
    for label, place in _places():
        table.add_row(label, escape(str(place)))
    console.print(table)
    for problem in problems:
        console.print(f"[yellow]will not work: {escape(problem)}[/yellow]", soft_wrap=True)


def _places() -> list[tuple[str, Path]]:
    """Return the folders that commands read from, and write to by default."""
    from axonn.training import places

    return [
        ("the suite's own files", places.ROOT),
        ("named files, from", Path.cwd()),
        ("runs of axonn train", places.RUNS.absolute()),
        ("runs of experiments", places.PROJECT / "runs"),
        ("results", places.PROJECT / "results"),
        ("figures", places.PROJECT / "plots" / "out"),
        ("this machine, measured", places.PROJECT / "experiments" / "machines" / "local.yaml"),
    ]


def _gpus() -> list[tuple[str, str]]:
    """Return the rows of the table about the GPUs."""
    import torch

    from axonn.training.provenance import this_machine

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rows = [("GPUs", str(count))]
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        rows.append((f"GPU {number}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if count:
        driver = this_machine(device="cuda").driver or "unknown"
        rows.append(("CUDA", f"{torch.version.cuda or torch.version.hip}, driver {driver}"))
        nccl = "over NCCL" if torch.distributed.is_nccl_available() else "over host memory, since there is no NCCL"
        rows.append(("ranks on GPUs", f"up to {count} with a GPU each {nccl}; more share them, over host memory"))
    return rows
