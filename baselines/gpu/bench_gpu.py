"""make bench-gpu: our engine on one GPU, beside plain PyTorch and other frameworks, and what its features bring there.

Parts: gpt (tokens/s and share of the peak), offload (memory and time of the memory optimisation), overlap (copies and
collectives hidden), unet (images/s), grids (2 to 4 ranks on the one device against one rank), predicted (the
performance model beside part gpt), largest (the largest GPT that trains). Each has a share of the time, and each
contender a process of its own; what fails is a row with its reason. --device cpu --quick tries all of it in miniature.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, get_args

from rich.console import Console

from axonn.cli.console import make_console
from axonn.cli.doc_links import explained
from axonn.device.devices import device_type
from axonn.durable_files import locked_folder
from axonn.errors import ConfigError
from axonn.observability.busy_watch import BusyWatch
from axonn.observability.records import Failure, Machine
from axonn.training.places import PROJECT, from_here
from axonn.training.provenance import this_machine
from baselines.gpu.bench_context import Context, NotMeasured, Part
from baselines.gpu.bench_rows import BenchRow, PartResult, failed, read_parts, write_part
from baselines.gpu.bench_summary import GPU_RECORDS, same_device, write_gpu_records, write_summary
from baselines.gpu.bench_table import remarks, table_of
from baselines.gpu.bench_work import BenchPlan, Device, plan_of
from baselines.gpu.parts import (
    part_gpt,
    part_grids,
    part_largest,
    part_offload,
    part_overlap,
    part_predicted,
    part_unet,
)
from baselines.gpu.peaks import Peak, peak_of

RESULTS = PROJECT / "results" / "gpu"
SECONDS = 520.0
"""Seconds for all parts in all, so that the command ends within 9 minutes."""


class Share(NamedTuple):
    """A part, and its share of the time."""

    measure: Part
    seconds: float


PARTS: Mapping[str, Share] = {
    "gpt": Share(part_gpt.measure, 220),
    "offload": Share(part_offload.measure, 75),
    "overlap": Share(part_overlap.measure, 40),
    "unet": Share(part_unet.measure, 20),
    "grids": Share(part_grids.measure, 50),
    "predicted": Share(part_predicted.measure, 5),
    "largest": Share(part_largest.measure, 110),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0 when every requested part has measured something, otherwise 1."""
    parser = argparse.ArgumentParser(prog="python -m baselines.gpu.bench_gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda (the default), or cpu, where only the miniature runs")
    parser.add_argument("--quick", action="store_true", help="tiny models: tries the benchmark, its times mean nothing")
    parser.add_argument("--only", default="", help=f"parts, by commas: {', '.join(PARTS)}")
    parser.add_argument("--resume", action="store_true", help="keep the parts that this commit has measured already")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time of all parts together")
    parser.add_argument("--out", type=Path, help="folder for results; default results/gpu, of a CPU results/gpu/cpu")
    options = parser.parse_args(arguments)
    wanted = chosen(options.only)
    device = checked_device(options.device, quick=options.quick)
    command = shlex.join(
        ["python", "-m", "baselines.gpu.bench_gpu", *(sys.argv[1:] if arguments is None else arguments)]
    )
    folder = options.out or default_folder(device, quick=options.quick)
    console = make_console(width=200)
    machine = this_machine(device=device)
    plan = plan_of(device, quick=options.quick)
    watch = BusyWatch()
    with locked_folder(folder, "wait for its end, or choose another --out"):
        parts = measured_parts(
            plan, wanted, folder, machine=machine, command=command, seconds=options.seconds, resume=options.resume,
            console=console,
        )  # fmt: skip
    summary = write_summary(folder, parts, command=command, machine=machine, quick=options.quick)
    ours = options.out is None and device == "cuda" and not options.quick
    write_gpu_records(GPU_RECORDS if ours else folder / "records.json", parts)
    console.print(table_of(parts, title=title_of(machine, plan)))
    for line in remarks(parts, list(PARTS)):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if warning := watch.warning():
        console.print(f"[yellow]{warning}[/yellow]", soft_wrap=True)
    console.print(f"written to {from_here(summary)}", highlight=False, soft_wrap=True)
    empty = [name for name in wanted if all(row.failure is not None for row in parts[name].rows)]
    return 1 if [name for name in empty if name != "predicted"] else 0


def chosen(only: str) -> list[str]:
    """Return the parts of `--only`, all where it is empty. Raises `ConfigError` for an unknown one."""
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    for name in wanted:
        if name not in PARTS:
            near = get_close_matches(name, PARTS, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ConfigError(f"unknown part '{name}'; {hint}known are {', '.join(PARTS)}")
    return [name for name in PARTS if name in wanted] if wanted else list(PARTS)


def checked_device(asked: str, *, quick: bool) -> Device:
    """Return the requested device. Raises `ConfigError` where it does not exist, or cannot run the whole benchmark."""
    if asked not in get_args(Device):
        raise ConfigError(f"unknown device '{asked}'; known are {', '.join(get_args(Device))}")
    try:
        device = device_type(asked)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; in miniature everything runs on a CPU: make bench-gpu DEVICE=cpu QUICK=1"
        ) from error
    if device == "cpu" and not quick:
        raise ConfigError("on a CPU only the miniature is measured: make bench-gpu DEVICE=cpu QUICK=1 (--quick)")
    return device


def default_folder(device: Device, *, quick: bool) -> Path:
    """Return the folder of results. Those of a CPU, and of the miniature, lie apart: they are never taken for those of
    a GPU."""
    folder = RESULTS if device == "cuda" else RESULTS / "cpu"
    return folder / "quick" if quick else folder


def measured_parts(
    plan: BenchPlan,
    wanted: Sequence[str],
    folder: Path,
    *,
    machine: Machine,
    command: str,
    seconds: float,
    resume: bool,
    console: Console,
) -> dict[str, PartResult]:
    """Measure the wanted parts one after the other, and return all parts that are there then.

    Each file is written as soon as its part is done. Time that a part leaves goes to those after it.
    """
    files = folder / "parts"
    parts = same_device(read_parts(files, list(PARTS)), machine.device)
    parts = {name: part for name, part in parts.items() if part.quick == plan.quick}
    if resume:
        wanted = [name for name in wanted if not is_done(parts.get(name), machine)]
    deadline = time.monotonic() + seconds
    peak = known_peak(parts, machine)
    for number, name in enumerate(wanted):
        waiting = sum(PARTS[later].seconds for later in wanted[number:])
        start = time.monotonic()
        mine = start + max(0.0, deadline - start) * PARTS[name].seconds / waiting
        context = Context(plan=plan, part=name, deadline=mine, earlier=parts, peak=peak)
        with console.status(name) as status:
            context.say = lambda what, name=name: status.update(f"{name}: {what}")  # type: ignore[misc]
            if name == "gpt" or context.peak is None:
                peak = context.peak = measured_peak(context, machine)
            rows, about = attempt(name, context)
        parts[name] = PartResult(
            part=name,
            rows=rows,
            about=about,
            quick=plan.quick,
            seconds=time.monotonic() - start,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            machine=machine,
        )
        write_part(files, parts[name])
        console.print(f"{name}: {len(rows)} rows in {parts[name].seconds:.0f} s", highlight=False)
    return {name: parts[name] for name in PARTS if name in parts}


def attempt(name: str, context: Context) -> tuple[list[BenchRow], dict[str, Any]]:
    """Measure a part. One that fails altogether yields a row with the failure, and the others go on."""
    try:
        return PARTS[name].measure(context)
    except NotMeasured as lost:
        return [failed(name, "all", "all", lost.failure)], {}
    except Exception as error:
        failure = Failure(cause="error", detail=f"{type(error).__name__}: {error}")
        return [failed(name, "all", "all", failure)], {}


def measured_peak(context: Context, machine: Machine) -> Peak:
    """Return the data sheet's peak, with the best large product measured here."""
    name = machine.device or context.plan.device
    try:
        return peak_of(name, context.task("peak", name="largest product", size=context.plan.product_size, most_s=60.0))
    except NotMeasured:
        return peak_of(name, {})


def known_peak(parts: Mapping[str, PartResult], machine: Machine) -> Peak | None:
    """Return the peak of part gpt where it was measured before."""
    about = parts["gpt"].about.get("peak") if "gpt" in parts else None
    return None if about is None or about.get("device") != machine.device else Peak(**about)


def is_done(part: PartResult | None, machine: Machine) -> bool:
    """Return whether a part needs no repetition: it is of this commit, without changes, and no row ran out of time."""
    if part is None or part.machine.commit != machine.commit or str(machine.commit).endswith("+"):
        return False
    return all(row.failure is None or row.failure.cause != "timeout" for row in part.rows)


def title_of(machine: Machine, plan: BenchPlan) -> str:
    device = machine.cpu if plan.device == "cpu" else machine.device
    mini = " in miniature: times mean nothing" if plan.quick else ""
    return f"measured on {device}{f' ({machine.driver})' if machine.driver else ''}, torch {machine.torch}{mini}"


if __name__ == "__main__":
    with explained("docs/compare.md"):
        sys.exit(main())
