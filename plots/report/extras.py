"""Tables of content whose form is not known beforehand: the entries that a figure adds to its summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from plots.report.report_tables import (
    FOLDED,
    LENGTHY,
    MOST_ROWS,
    Column,
    Form,
    Heading,
    ReportTable,
    entry,
    errors,
    is_grid,
    is_number,
    numbers,
    percents,
    seconds,
    seconds_like,
    sizes,
    table,
    text_of,
    texts,
    words,
)

ENDINGS: dict[str, tuple[Form, str]] = {
    "_s": (seconds, ""),
    "_ms": (numbers, "ms"),
    "_us": (numbers, "µs"),
    "_pct": (percents, ""),
    "_bytes": (sizes, ""),
    "_gb": (numbers, "GB"),
    "_mb": (numbers, "MB"),
    "_gb_per_s": (numbers, "GB/s"),
}
"""Form and unit of numbers by the ending of their key, the longest that fits."""


def column_of(key: str, values: Sequence[Any]) -> Column:
    """Return the column of a key that is not known beforehand: its ending says the unit."""
    is_text = not any(is_number(v) for v in values)
    ending = _ending(key)
    form: Form = numbers
    unit, name = "", key
    if key in {"bytes", "bytes_per_gpu", "bytes_per_batch", "bytes_sent"}:
        form = sizes
    elif "tflops" in key:
        name = key.replace("tflops", "TFLOP/s")
    elif ending and not is_text:
        form, unit = ENDINGS[ending]
        name = key.removesuffix(ending)
        if form is percents and "error" in key:
            form = errors
    heading = words(name) + (f" ({unit})" if unit else "")
    heading = heading.replace("gpus", "GPUs").replace("gpu", "GPU")
    return Column(heading=heading, value=entry(key), form=texts if is_text else form)


def rendered(name: str, value: Any, *, depth: int = 3) -> Iterator[ReportTable]:
    """Yield tables of content whose form is not known beforehand, under captions that name it; never fails."""
    value = _with_known_units(name, value)
    if isinstance(value, Mapping):
        yield from (
            _of_mapping(name.removesuffix(ending := _ending(name)), _ended(value, ending), depth) if value else ()
        )
    elif isinstance(value, list | tuple) and value and all(isinstance(v, Mapping) for v in value):
        yield _of_rows(name, [_flat(v) for v in value])
    elif isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
        yield _of_rows(name, [{words(name): v} for v in value])
    elif value is not None and value not in ([], ()):
        yield _of_pairs(name, {name: value})


TITLES = {
    "parts": "Parts of a batch",
    "phase_errors": "Errors of the predicted phases",
    "phase_mape": "Mean error of the predicted phases",
    "unexplained": "Share of a measured batch that no span explains",
    "overlap": "Collectives of tensor parallelism, and how much of them ran under compute",
    "traces": "Trace files, for Chrome's tracing page and for Perfetto",
    "per_gpu": "Grid, and bytes that a GPU sends for a batch",
    "speedups": "Speedup over Megatron-LM's scheme",
    "bytes_here": "Bytes that a rank sends for a batch, counted in the run and by the model",
}
"""Captions of extras whose names do not say enough."""
UNITS = {"overlap": {"compute": "_s", "collective": "_s", "hidden": "_s", "hideable": "_s"}}
"""Endings of the keys of extras whose own keys do not say their unit."""


def _with_known_units(name: str, value: Any) -> Any:
    units = UNITS.get(name, {})
    if not units or not isinstance(value, list) or not all(isinstance(v, Mapping) for v in value):
        return value
    return [{f"{k}{units.get(k, '')}": v for k, v in row.items()} for row in value]


def _of_mapping(name: str, value: Mapping[str, Any], depth: int) -> Iterator[ReportTable]:
    inside = {k: v for k, v in value.items() if isinstance(v, Mapping) and v and not is_grid(v)}
    # Several mappings of the same form are one table.
    if len(inside) == len(value) > 0 and all(_is_flat(v) for v in inside.values()):
        yield _of_rows(name, [{" ": k, **v} for k, v in inside.items()])
        return
    lists = {k: v for k, v in value.items() if isinstance(v, list | tuple) and v and isinstance(v[0], Mapping | str)}
    plain = {k: v for k, v in value.items() if k not in inside and k not in lists}
    if any(v not in ([], (), {}) for v in plain.values()):
        yield _of_pairs(name, plain)
    for key, content in {**inside, **lists}.items():
        if depth:
            yield from rendered(f"{name}: {key}", content, depth=depth - 1)
        else:
            yield _of_pairs(f"{name}: {key}", {key: content})


def _ending(key: str) -> str:
    """Return the ending of a key that says its unit; "" where none does."""
    return next((e for e in sorted(ENDINGS, key=len, reverse=True) if key.endswith(e)), "")


def _ended(value: Mapping[Any, Any], ending: str) -> dict[str, Any]:
    """Give the numbers of a mapping, at every depth, its unit as their ending, unless they have their own."""
    return {
        (key if isinstance(content, Mapping) or not is_number(content) or _ending(str(key)) else f"{key}{ending}"): (
            _ended(content, ending) if isinstance(content, Mapping) and not is_grid(content) else content
        )
        for key, content in value.items()
    }


def _is_flat(value: Mapping[str, Any]) -> bool:
    return not any(isinstance(v, Mapping) and not is_grid(v) for v in value.values())


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Make the numbers of small mappings inside a row columns of their own."""
    columns: dict[str, Any] = {}
    for key, value in ((str(k), v) for k, v in row.items()):
        if isinstance(value, Mapping) and not is_grid(value) and len(value) <= 8 and _is_flat(value):
            # Parts and phases of a batch are seconds, and have names of their own.
            plain = key in {"parts", "phases", "parts_s", "phases_s"}
            # Parts of something have its unit.
            endings = (e for e in ENDINGS if f"{key.rpartition('_')[0]}{e}" in row)
            ending = "_s" if plain else _ending(key) or next(endings, "")
            before = "" if plain else f"{words(key.removesuffix(ending))}: "
            columns |= {before + str(k): v for k, v in _ended(value, ending).items()}
        else:
            columns[key] = value
    return columns


def _of_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> ReportTable:
    keys = list(dict.fromkeys(str(key) for row in rows for key in row))
    shown = [{str(k): v for k, v in row.items()} for row in rows[:MOST_ROWS]]
    notes = [f"{len(rows) - MOST_ROWS} more rows are in summary.json."] if len(rows) > MOST_ROWS else []
    columns = [column_of(key, [row.get(key) for row in shown]) for key in keys]
    # Times that are read together have one unit.
    form = seconds_like(row.get(k) for row in shown for k in keys if k.endswith("_s"))
    columns = [replace(c, form=form) if c.form is seconds else c for c in columns]
    # Long texts go below.
    lengthy = [c for c in columns if c.form is texts and any(len(text_of(c.value(r))) > LENGTHY for r in shown)]
    for column in lengthy[: len(columns) - 1]:
        columns.remove(column)
        rows_with_text: dict[str, list[str]] = {}
        for row in shown:
            if column.value(row) is not None:
                rows_with_text.setdefault(text_of(column.value(row)), []).append(text_of(columns[0].value(row)))
        notes += [
            f"{column.heading} ({', '.join(dict.fromkeys(names))}): {text}" for text, names in rows_with_text.items()
        ]
    return replace(table(_caption(name), shown, columns, notes=notes), folded=len(shown) > FOLDED)


def _of_pairs(name: str, value: Mapping[str, Any]) -> ReportTable:
    rows = []
    for key, content in value.items():
        column = column_of(str(key), [content])
        unit, (cell,) = column.form([content])
        rows.append([column.heading + (f" ({unit})" if unit else ""), cell])
    has_text = any(isinstance(content, str) for content in value.values())
    headings = [Heading(text="what", number=False), Heading(text="value", number=not has_text)]
    return ReportTable(caption=_caption(name), headings=headings, rows=rows, notes=[])


def _caption(name: str) -> str:
    text = TITLES.get(name.removesuffix(_ending(name))) or words(name.removesuffix(_ending(name)))
    return text[:1].upper() + text[1:]
