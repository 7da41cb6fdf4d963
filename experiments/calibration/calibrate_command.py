"""The command `axonn calibrate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from axonn.cli.console import console, launched_once, progress_bar, warn
from axonn.cli.doc_links import documented
from axonn.training.places import from_here


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
    from axonn.config.train_config import PrecisionConfig, validate
    from axonn.device.devices import device_type
    from axonn.observability.busy_watch import BusyWatch
    from experiments.calibration.measure_machine import LOCAL, LOCAL_GPU
    from experiments.calibration.measure_machine import calibrate as measure

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
