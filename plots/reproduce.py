"""All parts of the reproduction one after the other, then the report: python -m plots.reproduce TARGET...

Each target of the Makefile is made by itself. One that fails is named at the end, and the others are made all the same.
After an interruption the same command continues, since every target keeps what it has finished.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from axonn.cli.console import make_console
from axonn.training.places import PROJECT

INTERRUPTED = 130
LAST = "report"
"""Target that is made at the end, whatever failed before it."""
PATIENCE_S = 30.0
"""Time that an interrupted child has to stop its ranks."""


class Terminated(KeyboardInterrupt):
    """A stop by SIGTERM, which reaches this process alone."""


def end_of(target: str) -> list[str]:
    """Return the closing remarks of a target's figure: points measured on a busy machine, frameworks not installed."""
    from plots.figure import end_lines, load_summary

    name = target.removeprefix("reproduce-")
    summary = None if name == target else load_summary(name)
    return [] if summary is None else end_lines(summary, name)


def make(target: str) -> int:
    """Make one target and return the exit status. Ctrl-C reaches the child, too, whose end is awaited."""
    command = [os.environ.get("MAKE", "make"), "--no-print-directory", "--keep-going", target]
    with subprocess.Popen(command, cwd=PROJECT) as child:
        try:
            return child.wait()
        except KeyboardInterrupt as stopped:
            try:
                child.wait(0.0 if isinstance(stopped, Terminated) else PATIENCE_S)
            except subprocess.TimeoutExpired:
                child.terminate()
                child.wait()
            raise


def reproduce(targets: Sequence[str], *, run: Callable[[str], int] = make, console: Console | None = None) -> int:
    """Make all targets and the report. Returns the exit status: 1 if one failed, 130 when interrupted."""
    console = console or make_console()
    parts = [*targets, LAST]
    done: list[tuple[str, int, float]] = []
    for number, target in enumerate(parts, start=1):
        console.rule(f"{number} of {len(parts)}: make {target}", align="left")
        start = time.perf_counter()
        try:
            status = run(target)
        except KeyboardInterrupt:
            status = INTERRUPTED
        # The status of a child that a signal ended is its negative.
        if status in {INTERRUPTED, -signal.SIGINT, -signal.SIGTERM}:
            console.print(
                f"[yellow]interrupted in make {target}; {number - 1} of {len(parts)} parts are done. "
                "make reproduce goes on where it was[/yellow]",
                soft_wrap=True,
            )
            return INTERRUPTED
        done.append((target, status, time.perf_counter() - start))
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for target, status, seconds in done:
        outcome = "[green]done[/green]" if status == 0 else "[red]not complete[/red], see above"
        table.add_row(f"make {target}", outcome, f"{seconds:.0f} s")
    console.print(table)
    for target, _, _ in done:
        for line in end_of(target):
            console.print(f"[yellow]make {target}: {escape(line)}[/yellow]", soft_wrap=True)
    failed = [target for target, status, _ in done if status]
    if failed:
        names = ", ".join(f"make {target}" for target in failed)
        console.print(f"[red]not complete: {names}[/red]; make reproduce repeats these alone", soft_wrap=True)
    return 1 if failed else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Terminated


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m plots.reproduce", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="of the Makefile, for instance reproduce-fig6")
    targets = parser.parse_args().targets
    if not targets:
        sys.exit("error: name the targets of the Makefile to make, or type: make reproduce")
    if not (PROJECT / "Makefile").is_file():
        print(
            f"error: there is no Makefile in {PROJECT}; type make reproduce in the folder of the project",
            file=sys.stderr,
        )
        sys.exit(2)
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(reproduce(targets))


if __name__ == "__main__":
    main()
