"""Tables of `axonn predict --validate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from axonn.observability.records import Record
from axonn.perf.timing.jitter import JitterSpread
from experiments.validation.validation_results import Fitted, SetResult, ValidationRow


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table


def _pct(value: float | None, *, sign: bool = False) -> str:
    return "" if value is None else f"{value:+.1f}%" if sign else f"{value:.1f}%"


def set_table(result: SetResult) -> Table:
    """Return the table of measured, predicted, error, and the constant-TFLOP/s predictor."""
    units = {row.quantity for row in result.rows}
    title = f"{result.name}: {result.title}" + (f" ({next(iter(units))})" if len(units) == 1 else "")
    rows = [*result.rows, *result.ratios]
    rated = any(row.constant is not None for row in rows)
    table = _table(title, "", "measured", "predicted", "error", *(("constant", "error") if rated else ()))
    for row in rows:
        cells = [row.label if len(units) == 1 else row.key, f"{row.measured:.4g}", f"{row.predicted:.4g}"]
        cells[0] += "" if row.fits else " [red](does not fit)[/red]"
        cells.append(_pct(row.error_pct, sign=True))
        if rated:
            cells.append("" if row.constant is None else f"{row.constant:.4g}")
            cells.append(_pct(row.constant_error_pct, sign=True))
        table.add_row(*cells)
    return table


def remarks(result: SetResult) -> Iterator[str]:
    """Yield the lines below the table: rules for open settings, and their outcomes."""
    for rule in result.open:
        yield f"open: {rule.setting}: {' '.join(rule.rule.split())}"
    for choice in dict.fromkeys(f"{row.label}: {c}" for row in result.rows for c in row.chosen):
        yield f"chosen: {choice}"
    for choice in dict.fromkeys(c for row in result.ratios for c in row.chosen):
        yield f"chosen: {choice}"


def variant_table(result: SetResult) -> Table:
    """Return the table of predictions under other assumptions; its columns are `variant_names`."""
    names = list(dict.fromkeys(name for variant in result.variants for name in variant.predicted))
    columns = [letter for letter, _ in variant_names(result)]
    table = _table(f"{result.name}: with other assumptions", "", *columns)
    for name in names:
        cells = (f"{v.predicted[name]:.4g}" if name in v.predicted else "" for v in result.variants)
        table.add_row(name, *cells)
    if any(variant.mean_pct is not None for variant in result.variants):
        table.add_row("mean error", *(_pct(variant.mean_pct) for variant in result.variants))
    return table


def variant_names(result: SetResult) -> list[tuple[str, str]]:
    """Return a short name for each column of `variant_table`, and its meaning."""
    names = []
    for number, variant in enumerate(result.variants):
        name = chr(ord("a") + number - 1) if number else "as above"
        names.append((name, variant.label + ("" if variant.fits else " (does not fit)")))
    return names


def summary_table(results: Sequence[SetResult]) -> Table:
    """Return the table with one line per set."""
    names = ("points", "mean", "max", "bias", "rank", "constant", "held out", "goals met")
    table = _table("All data sets: errors; constant: the constant-TFLOP/s predictor, held out: by model", "", *names)
    for r in results:
        rows: list[ValidationRow] = r.rows or r.ratios
        met = sum(goal.met for goal in r.goals)
        table.add_row(
            r.name,
            str(len(rows)),
            _pct(r.mean_pct),
            _pct(r.max_pct),
            _pct(r.bias_pct, sign=True),
            "" if r.rank_correlation is None else f"{r.rank_correlation:.2f}",
            _pct(r.constant_mean_pct),
            _pct(r.constant_held_out_pct),
            f"{met}/{len(r.goals)}" if r.goals else "",
        )
    return table


def goal_table(results: Sequence[SetResult]) -> Table:
    """Return the table of the bounds that the project set itself."""
    table = _table("Goals", "", "what", "bound", "reached", "")
    for result in results:
        for goal in result.goals:
            met = "[green]met[/green]" if goal.met else "[red]missed[/red]"
            table.add_row(result.name, goal.what, _pct(goal.bound), _pct(goal.reached), met)
    return table


def fitted_table(fitted: Sequence[Fitted]) -> Table:
    """Return the table of fitted constants of the machines."""
    table = _table("Fitted constants: mean errors on the points that they were fitted on, and on points held out")
    for name in ("machine", "what", "points", "in sample", "held out"):
        table.add_column(name, justify="left" if name in {"machine", "what"} else "right")
    for f in fitted:
        errors = _pct(f.in_sample_error_pct), _pct(f.held_out_error_pct)
        table.add_row(f.machine, f.what, str(f.points), *errors)
    return table


def spread_table(records: Sequence[Record]) -> Table:
    """Return the table of batch times under jitter, in seconds."""
    table = _table("Batch times under jitter, seconds", "", "mean", "10%", "median", "90%")
    for record in records:
        spread = JitterSpread(tuple(record.batch_times_s))
        numbers = (spread.mean, *(spread.percentile(p) for p in (10, 50, 90)))
        table.add_row(f"{record.asked.model} {record.ran.framework}", *(f"{n:.4g}" for n in numbers))
    return table
