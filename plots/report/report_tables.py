"""Tables of the report: plain rows made into columns of text, with sensible digits and units in the headings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

SHORT = 24
"""Characters up to which a text is kept on one line."""
LENGTHY = 60
"""Characters above which a text goes below a table whose content is not known beforehand."""
COMPACT = 14
"""Rows up to which a table is kept on one page."""
MANY = 8
"""Columns above which a table is set smaller on paper."""
FOLDED = 24
"""Rows above which a table whose content is not known beforehand is folded."""
NOTHING = "\N{EN DASH}"
"""Text of a cell without a value."""
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
MOST_ROWS = 60
"""Largest number of rows of a table whose content is not known beforehand."""
MOST_VALUES = 6
"""Entries of a list that a cell shows; of a longer list it shows the ends."""
GRID = ("data", "inter", "row", "col")

Formatted = tuple[str, list[str]]
"""The unit that the heading gets, and the cells."""
Form = Callable[[Sequence[Any]], Formatted]
"""Makes the cells of a column from all its values, so that they have the same unit and digits."""
Value = Callable[[Mapping[str, Any]], Any]
"""Takes the value of a cell from its row."""


@dataclass(frozen=True, kw_only=True)
class Heading:
    """The heading of a column. `short`: the column's texts are not broken into lines."""

    text: str
    number: bool
    short: bool = False

    @property
    def style(self) -> str:
        """CSS class of the column's cells."""
        return "number" if self.number else "short" if self.short else "long"


@dataclass(frozen=True, kw_only=True)
class ReportTable:
    """A table as the page shows it. `folded`: shown only on demand, and in print."""

    caption: str
    headings: list[Heading]
    rows: list[list[str]]
    notes: list[str]
    folded: bool = False

    @property
    def style(self) -> str:
        """CSS classes: few rows stay on one page, many columns are set smaller on paper."""
        classes = {"compact": len(self.rows) <= COMPACT, "many": len(self.headings) > MANY}
        return " ".join(name for name, applies in classes.items() if applies)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its heading, and how its cells are made from the rows."""

    heading: str
    value: Value
    form: Form


def entry(*keys: str) -> Value:
    """Return the accessor of a row's entry; of several keys, of an entry of the mapping under the key before."""

    def value(row: Mapping[str, Any]) -> Any:
        for outer in keys[:-1]:
            row = mapping(row.get(outer))
        return row.get(keys[-1])

    return value


def table(
    caption: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], *, notes: Sequence[str] = ()
) -> ReportTable:
    """Make a table; columns in which no row has a value are left out."""
    valued = [(c, [c.value(r) for r in rows]) for c in columns]
    shown = [(c, values) for c, values in valued if any(v is not None for v in values)]
    formed = [c.form(values) for c, values in shown]
    return ReportTable(
        caption=caption,
        headings=[
            Heading(
                text=f"{c.heading} ({unit})" if unit else c.heading,
                number=c.form is not texts,
                short=all(len(cell) <= SHORT for cell in cells),
            )
            for (c, _), (unit, cells) in zip(shown, formed, strict=True)
        ],
        rows=[list(cells) for cells in zip(*(cells for _, cells in formed), strict=True)],
        notes=list(notes),
    )


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fixed(value: Any, decimals: int, *, sign: bool = False) -> str:
    """Format a number with these decimals and separated thousands; with more where only zeros would be left."""
    if not is_number(value):
        return text_of(value)
    text = f"{value:+,.{decimals}f}" if sign else f"{value:,.{decimals}f}"
    if not re.search("[1-9]", text):
        places = -math.floor(math.log10(abs(value))) if value else 0
        text = f"{0:.{decimals}f}" if sign or not value else f"{value:.{places}f}" if places < 6 else f"{value:.1e}"
    return text.replace("-", MINUS)


def texts(values: Sequence[Any]) -> Formatted:
    """Format values as text."""
    return "", [text_of(v) for v in values]


def numbers(values: Sequence[Any]) -> Formatted:
    """Format numbers with as many decimals in all cells as the largest needs for four digits."""
    finite = [abs(v) for v in values if is_number(v)]
    if all(isinstance(v, int) for v in values if is_number(v)):
        return "", [fixed(v, 0) for v in values]
    decimals = decimals_for(max(finite, default=0.0))
    return "", [fixed(v, decimals) for v in values]


def decimals_for(top: float) -> int:
    """Return the decimals that give the largest value four digits."""
    return 3 if not top else min(8, max(0, 3 - math.floor(math.log10(top))))


def seconds(values: Sequence[Any]) -> Formatted:
    """Format seconds; in ms where all are shorter than a second."""
    finite = [abs(v) for v in values if is_number(v)]
    if finite and 0 < max(finite) < 1:
        return milliseconds(values)
    return "s", numbers(values)[1]


def seconds_like(values: Iterable[Any]) -> Form:
    """Return the form of seconds in columns that are read together: unit and decimals of the largest of all values."""
    top = max((abs(v) for v in values if is_number(v)), default=1.0)
    unit, scale = ("ms", 1e3) if 0 < top < 1 else ("s", 1.0)
    decimals = decimals_for(top * scale)

    def form(column: Sequence[Any]) -> Formatted:
        return unit, [fixed(v * scale if is_number(v) else v, decimals) for v in column]

    return form


def milliseconds(values: Sequence[Any]) -> Formatted:
    """Format seconds as ms."""
    return "ms", numbers([1e3 * v if is_number(v) else v for v in values])[1]


def plain_seconds(values: Sequence[Any]) -> Formatted:
    """Format seconds, never as ms, for columns that are read together."""
    return "s", numbers(values)[1]


def significant(values: Sequence[Any]) -> Formatted:
    """Format numbers with four digits each, for columns of unlike numbers."""
    return "", [text_of(float(v)) if is_number(v) else text_of(v) for v in values]


def ratios(values: Sequence[Any]) -> Formatted:
    """Format ratios with three decimals."""
    return "", [fixed(v, 3) for v in values]


def errors(values: Sequence[Any]) -> Formatted:
    """Format percent with their sign and one decimal."""
    return "%", [fixed(v, 1, sign=True) for v in values]


def percents(values: Sequence[Any]) -> Formatted:
    """Format percent with one decimal; with their sign where some are negative."""
    sign = any(is_number(v) and v < 0 for v in values)
    return "%", [fixed(v, 1, sign=sign) for v in values]


def sizes(values: Sequence[Any]) -> Formatted:
    """Format bytes in the unit (a power of 1000) in which the largest has one to three digits."""
    top = max((abs(v) for v in values if is_number(v)), default=0)
    power = min(5, max(0, int(math.log10(top) // 3))) if top >= 1 else 0
    unit = ("bytes", "kB", "MB", "GB", "TB", "PB")[power]
    return unit, numbers([v / 1000**power if is_number(v) and power else v for v in values])[1]


def text_of(value: Any) -> str:
    """Return the text of a cell, whatever its value is."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return fixed(value, 0) if isinstance(value, int) else f"{value:.4g}".replace("-", MINUS)
    if isinstance(value, Mapping):
        return grid_text(value) or ", ".join(f"{words(k)} {text_of(v)}" for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if any(isinstance(v, Mapping | list | tuple) for v in value):
            text = json.dumps(value, default=str)
            return text if len(text) < 80 else f"{len(value)} entries"
        if len(value) > MOST_VALUES:
            return f"{len(value)} values, {text_of(value[0])} to {text_of(value[-1])}"
        return ", ".join(text_of(v) for v in value) or NOTHING
    return str(value)


def is_grid(value: Any) -> bool:
    """Return whether a value is a grid: a mapping with the extents of all axes."""
    return isinstance(value, Mapping) and set(value) == set(GRID)


def grid_text(grid: Any) -> str | None:
    """Return "data x inter x row x col" with the extents of a grid; None of anything else."""
    return TIMES.join(text_of(grid[axis]) for axis in GRID) if is_grid(grid) else None


def words(key: Any) -> str:
    """Return a key as words; names of extents (G_inter) stay."""
    return re.sub(r"(?<!\bG)_", " ", str(key).strip())


def strings(value: Any) -> list[str]:
    """Return a text, or a list of them, as a list."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list | tuple):
        return [v if isinstance(v, str) else json.dumps(v, default=str) for v in value]
    return []


def mapping(value: Any) -> dict[str, Any]:
    """Return a mapping as it is, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}
