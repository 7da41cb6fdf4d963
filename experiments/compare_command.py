"""The command `axonn compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from axonn.cli.console import console
from axonn.cli.doc_links import documented


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
