"""Tables of a comparison on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from baselines.comparison import Result, Verdict
from baselines.contenders import Contender
from baselines.junit import text_of

Row = Mapping[str, Any]
_COLUMNS = (
    "framework", "batch s", "quartiles", "tokens/s", "MiB", "MB sent", "ratio", "interval", "cpu s", "cpu ratio",
    "cpu interval",
)  # fmt: skip
_ON_WIDE = ("quartiles", "tokens/s", "cpu interval")
_WIDE = 126
"""Columns of a screen on which all of them fit; on a narrower one those of `_ON_WIDE` are left out."""


def show(
    console: Console,
    rows: Sequence[Row],
    results: Sequence[Result],
    verdicts: Sequence[Verdict],
    refused: Mapping[str, Sequence[Contender]],
) -> None:
    """Print one table for each workload, loopback and link apart; then verdicts and who did not take part."""
    notes = list(dict.fromkeys(row["disclosure"] for row in rows if row["disclosure"]))
    for (workload, over_link), some in groupby(sorted(rows, key=_place), key=_place):
        console.print(
            _table(f"{workload}, {'emulated link' if over_link else 'loopback'}", list(some), notes, console.width)
        )
    for number, note in enumerate(notes, 1):
        console.print(f"[{number}] {note}", soft_wrap=True, highlight=False, markup=False)
    console.print(
        "batch: median and quartiles of its seconds; MiB: peak of a rank; sent: by a rank for a batch (over the link: "
        "what crossed it); ratio: to the fastest AxoNN of the kind, median of paired rounds with its 95% interval "
        "(least and most of fewer than 6 rounds); cpu: processor seconds of all ranks for a batch, and the same of "
        "them; (busy): in all rounds the machine was busy with other work",
        soft_wrap=True,
        highlight=False,
        style="dim",
    )
    for line in failures(results):
        console.print(f"[red]{escape(line)}[/red]", soft_wrap=True, highlight=False)
    for reason, some_refused in refused.items():
        names = ", ".join(contender.name for contender in some_refused)
        console.print(f"[yellow]not compared: {escape(names)}: {escape(reason)}[/yellow]", soft_wrap=True)
    for verdict in verdicts:
        where = f"{verdict.workload}, {verdict.condition}, {verdict.kind}"
        colour = "red" if verdict.behind else "yellow" if verdict.ratio is None else "green"
        console.print(f"[{colour}]{escape(where)}: {escape(text_of(verdict))}[/{colour}]", soft_wrap=True)


def failures(results: Sequence[Result]) -> list[str]:
    """Return a line for each contender that failed or did other work, once for each workload."""
    return list(
        dict.fromkeys(
            f"{r.workload}, {'link' if r.condition.kbit else 'loopback'}: {r.contender.name} "
            f"({r.failure.cause}): {r.failure.detail}"
            for r in results
            if r.failure is not None
        )
    )


def _place(row: Row) -> tuple[str, bool]:
    return row["workload"], row["link_kbit_per_s"] is not None


def _table(title: str, rows: Sequence[Row], notes: Sequence[str], width: int) -> Table:
    columns = _COLUMNS if width >= _WIDE else [name for name in _COLUMNS if name not in _ON_WIDE]
    ranks = ", ".join(str(n) for n in sorted({row["ranks"] for row in rows}))
    table = Table(title=f"{title}, {ranks} ranks", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name == "framework" else "right", no_wrap=name != "framework")
    for number, some in enumerate(_sections(rows)):
        if number:
            table.add_section()
        table.add_row(f"[dim]{escape(_heading(some[0]))}[/dim]")
        for row in sorted(some, key=lambda r: (not r["ours"], r["batch_time_s"])):
            cells = _cells(row, notes)
            table.add_row(*(cells[name] for name in columns))
    return table


def _sections(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the rows of the same kind and condition."""
    for _, some in groupby(rows, key=lambda r: (r["parallelism"], r["condition"])):
        yield list(some)


def _heading(row: Row) -> str:
    kind, rate = row["parallelism"], row["link_kbit_per_s"]
    return kind if rate is None else f"{kind}: {row['condition'].removeprefix('link: ')}, {rate / 1000:.0f} Mbit/s"


def _cells(row: Row, notes: Sequence[str]) -> dict[str, str]:
    """Return the cells of a row by column."""
    name = escape(f"{row['framework']} {row['strategy']}")
    if row["disclosure"]:
        name += escape(f" [{notes.index(row['disclosure']) + 1}]")
    if row["busy"]:
        name += " (busy)"
    low, high = row["batch_time_quartiles_s"]
    memory, sent, ratio, processor = row["memory_bytes"], row["bytes_sent"], row["ratio"], row["processor_ratio"]
    return {
        "framework": f"[bold]{name}[/bold]" if row["ours"] else name,
        "batch s": f"{row['batch_time_s']:.3f}",
        "quartiles": f"{low:.3f}-{high:.3f}",
        "tokens/s": f"{row['tokens_per_s']:,.0f}",
        "MiB": "-" if memory is None else f"{memory / 2**20:,.0f}",
        "MB sent": "-" if sent is None else f"{sent / 1e6:.1f}",
        "ratio": ("-" if row["failure"] is None else "none") if ratio is None else f"{ratio:.3f}",
        "interval": _interval(row["spread"]),
        "cpu s": "-" if row["processor_s"] is None else f"{row['processor_s']:.3f}",
        "cpu ratio": "-" if processor is None else f"{processor:.3f}",
        "cpu interval": _interval(row["processor_spread"]),
    }


def _interval(spread: Sequence[float] | None) -> str:
    """Return both ends; nothing for a contender that is compared with itself."""
    return "" if spread is None or spread[0] == spread[1] else f"{spread[0]:.3f}-{spread[1]:.3f}"
