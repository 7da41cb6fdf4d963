"""One figure in the report: what its summary says, as a section with tables."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axonn.errors import AxonnError
from axonn.training.places import PROJECT
from experiments.definition import ROOT, load_experiment
from plots import figure, style
from plots.figure import end_lines
from plots.report.extras import column_of
from plots.report.point_tables import KINDS, KNOWN, WOVEN_IN, tables_of
from plots.report.report_tables import NOTHING, ReportTable, fixed, is_number, mapping, strings

POSTER = ("fig3", "fig5", "fig6", "fig7")
LARGEST_VECTOR = 600_000
"""Bytes of an SVG that is shown; instead of a larger one the bitmap is, if that is smaller."""
MOST_FOLDERS = 3
_CSS_PX = {"pt": 4 / 3, "px": 1.0, "in": 96.0, "": 1.0}
_SCALE = 1.35
"""Pictures are drawn for paper; on a screen they are that much larger."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """`source`: the whole file as a data URI. Width and height in CSS pixels."""

    source: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """`made`: there is a summary. `status`: in words."""

    name: str
    heading: str
    title: str
    command: str
    made: bool
    status: str
    about: str = ""
    differs: list[str] = field(default_factory=list)
    picture: Picture | None = None
    drawn: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    mean_error: str = NOTHING
    remarks: list[str] = field(default_factory=list)
    tables: list[ReportTable] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ways: list[tuple[str, list[str]]] = field(default_factory=list)
    """Commands, each with what of `missing` it makes; an empty one for the rest."""
    failed: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    to_know: list[str] = field(default_factory=list)
    """What a busy machine measured, and frameworks that are not installed, each with what to do."""
    provenance: list[tuple[str, list[str]]] = field(default_factory=list)
    machines: list[dict[str, Any]] = field(default_factory=list)


def names() -> list[str]:
    """Of all figures: the poster's, then every other experiment, then summaries that belong to none."""
    # An experiment without a figure of its own is the user's.
    own = {p.stem for p in (ROOT / "experiments").glob("*.yaml") if (ROOT / "plots" / f"{p.stem}.py").exists()}
    made = {path.parent.name for path in figure.RESULTS.glob("*/summary.json") if figure.load_summary(path.parent.name)}
    made.discard("baselines")
    return [*POSTER, *sorted((own | made) - set(POSTER))]


def section(name: str) -> Section:
    """A figure that has not been made, or whose summary cannot be used, says so and how to make it."""
    poster = name in POSTER
    command = f"make reproduce-{name}"
    title, about, differs = _described(name)
    path = figure.summary_file(name)
    summary = figure.load_summary(name)
    known: dict[str, Any] = {"name": name, "command": command, "differs": differs, "about": about}
    if summary is None or not isinstance(summary.get("rows", []), list):
        there = "has a summary that is none" if path.exists() else "not made"
        number = f"Figure {name.removeprefix('fig')}" + (f": {title}" if title else "")
        heading = number if poster else title or name
        return Section(**known, title=title or name, heading=heading, made=False, status=f"{there}: {command}")
    title = str(summary.get("title") or title or name)
    rows = [row for row in summary.get("rows", []) if isinstance(row, dict)]
    missing = strings(summary.get("missing"))
    failures = [f for f in summary.get("failures") or [] if isinstance(f, dict) and isinstance(f.get("failure"), dict)]
    failed = [_failure(f) for f in failures if f["failure"].get("cause") != "unavailable"]
    not_run = list(dict.fromkeys(_failure(f) for f in failures if f["failure"].get("cause") == "unavailable"))
    counts = {kind: sum(row.get("kind") == kind for row in rows) for kind in KINDS}
    counts = {kind: count or _beside(summary, kind) for kind, count in counts.items()}
    provenance = mapping(summary.get("provenance"))
    heading = f"Figure {name.removeprefix('fig')}: {title}" if poster else title
    drawn = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    busy, absent = strings(summary.get("busy")), mapping(summary.get("not_installed"))
    unknown = strings(summary.get("not_known_whether_busy"))
    states = [
        f"{len(missing)} missing" if missing else "",
        f"{len(failed)} failed" if failed else "",
        f"{len(busy)} measured on a busy machine" if busy else "",
        f"of {len(unknown)} not known whether the machine was busy" if unknown else "",
        f"not installed: {', '.join(map(str, absent))}" if absent else "",
    ]
    picture = picture_of(name, f"{heading}. Drawn are {drawn or 'no'} points; the tables below have their numbers.")
    return Section(
        name=name,
        heading=heading,
        title=title,
        command=str(provenance.get("command") or command),
        made=True,
        status="; ".join(filter(None, [*states, "" if picture else "picture missing"])) or "complete",
        about=str(summary.get("about") or about or ""),
        differs=strings(summary.get("differs")) or differs,
        picture=picture,
        drawn=f"Points: {drawn}." if drawn else "No points.",
        counts=counts,
        mean_error=_mean_error(summary),
        remarks=_remarks(summary),
        tables=[t for t in tables_of(summary, rows) if t.rows],
        missing=missing,
        ways=ways_to(missing),
        failed=failed,
        to_know=end_lines(
            {
                "busy": busy,
                "busy_in_ratios": summary.get("busy_in_ratios"),
                "not_known_whether_busy": unknown,
                "not_installed": {str(label): str(only) for label, only in absent.items()},
            },
            name,
        ),
        not_run=not_run,
        provenance=_provenance(name, summary, provenance),
        machines=_machines(rows, provenance),
    )


def ways_to(missing: Sequence[str]) -> list[tuple[str, list[str]]]:
    """What is missing, by the command behind '; run: '."""
    found: dict[str, list[str]] = {}
    for line in missing:
        what, _, command = line.partition("; run: ")
        found.setdefault(command, []).append(what)
    return list(found.items())


def _described(name: str) -> tuple[str, str, list[str]]:
    """Title, about and differs as the experiment has them."""
    try:
        found = load_experiment(ROOT / "experiments" / f"{name}.yaml")
    except (AxonnError, OSError):
        return "", "", []
    return found.title, found.about, found.differs


def picture_of(name: str, alt: str) -> Picture | None:
    """The picture of this name, of plots/out."""
    vector, bitmap = (style.OUT / f"{name}.{ending}" for ending in ("svg", "png"))
    for path in (vector, bitmap):
        if not path.exists():
            continue
        large = path is vector and path.stat().st_size > LARGEST_VECTOR
        if large and bitmap.exists() and bitmap.stat().st_size < path.stat().st_size:
            continue
        content = path.read_bytes()
        size = _svg_size(content) if path is vector else _png_size(content)
        if size is None:
            continue
        kind = "image/svg+xml" if path is vector else "image/png"
        source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        return Picture(source=source, width=round(size[0] * _SCALE), height=round(size[1] * _SCALE), alt=alt)
    return None


def _svg_size(content: bytes) -> tuple[float, float] | None:
    start = re.search(rb"<svg\b[^>]*>", content)
    found = (
        [re.search(rb'\b%s="([0-9.]+)(pt|px|in|)"' % name, start[0]) for name in (b"width", b"height")] if start else []
    )
    if len(found) < 2 or not all(found):
        return None
    width, height = (float(f[1]) * _CSS_PX[f[2].decode()] for f in found if f)
    return width, height


def _png_size(content: bytes) -> tuple[float, float] | None:
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        return None
    width, height = struct.unpack(">II", content[16:24])
    # Bitmaps have 300 dots per inch (`plots.style.save`).
    return width * 96 / 300, height * 96 / 300


def _mean_error(summary: Mapping[str, Any]) -> str:
    found = mapping(mapping(summary.get("mape_pct")).get("predicted")).get("all", summary.get("phase_mape_pct"))
    return f"{fixed(found, 1)}%" if is_number(found) else NOTHING


def _beside(summary: Mapping[str, Any], kind: str) -> int:
    """Points of a kind that are no batch times: of the first of the figure's own tables that has some."""
    for key, value in summary.items():
        if key in KNOWN or key in WOVEN_IN:
            continue
        if str(key).startswith(kind) and isinstance(value, dict) and value:
            return len(value)
        if not isinstance(value, list):
            continue
        rows = [row for row in value if isinstance(row, dict)]
        count = sum(row.get("kind") == kind for row in rows) or sum(
            any(str(k).startswith(kind) and is_number(v) for k, v in row.items()) for row in rows
        )
        if count:
            return count
    return 0


def _remarks(summary: Mapping[str, Any]) -> list[str]:
    """Mean errors in words."""
    lines = []
    for kind, of in mapping(summary.get("mape_pct")).items():
        each = {name: value for name, value in mapping(of).items() if is_number(value)}
        if "all" in each:
            parts = [f"{name} {fixed(value, 1)}%" for name, value in each.items() if name != "all"]
            beside = f" ({', '.join(parts)})" if len(parts) > 1 else ""
            lines.append(f"Mean absolute error of the {kind} points: {fixed(each['all'], 1)}%{beside}.")
    naive = mapping(summary.get("naive"))
    if is_number(naive.get("mape_pct")) and is_number(naive.get("tflops_per_gpu")):
        lines.append(
            f"For comparison: a constant {fixed(naive['tflops_per_gpu'], 1)} TFLOP/s of every GPU, fitted on "
            f"{naive.get('fitted_on')}, has {fixed(naive['mape_pct'], 1)}%."
        )
    wrong = mapping(summary.get("wrong_orders"))
    for kind, pairs in wrong.items():
        lines += [f"Wrong order, {kind}: {pair}." for pair in strings(pairs)]
    if counts_of(summary, "predicted") and wrong.get("predicted") == []:
        lines.append("The predicted order of the frameworks is the published one at every size.")
    return lines


def counts_of(summary: Mapping[str, Any], kind: str) -> int:
    """Points of a kind."""
    return sum(isinstance(row, dict) and row.get("kind") == kind for row in summary.get("rows") or [])


# Provenance


def _provenance(name: str, summary: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    records = mapping(provenance.get("records"))
    experiment = ROOT / "experiments" / f"{name}.yaml"
    policy = mapping(summary.get("policy"))
    machine = mapping(provenance.get("machine"))
    entries = [
        ("made by", strings(provenance.get("command"))),
        ("experiment", [f"experiments/{name}.yaml"] if experiment.exists() else []),
        ("published points", [*strings(records.get("published")), *strings(provenance.get("sources"))]),
        ("predicted by", strings(records.get("predicted"))),
        ("measured in", shortened(strings(records.get("measured")))),
        ("policy", ["; ".join(f"{column_of(k, [0]).heading}: {v}" for k, v in policy.items())] if policy else []),
        ("drawn on", [machine_text(machine)] if machine else []),
        ("numbers", [f"results/{name}/summary.json"]),
    ]
    return [(what, lines) for what, lines in entries if lines]


def shortened(folders: Sequence[str]) -> list[str]:
    """Of many run folders the ends."""
    if len(folders) <= MOST_FOLDERS:
        return list(folders)
    return [f"{folders[0]} to {folders[-1]} ({len(folders)} run folders)"]


def machine_text(machine: Mapping[str, Any]) -> str:
    """Cores, versions and commit in one line."""
    cores = f"{machine['cores']} cores of {machine.get('cpu', 'unknown')}" if machine.get("cores") else ""
    named = {"device": "", "python": "Python ", "torch": "torch ", "mpi": "", "commit": "commit "}
    parts = [cores, *(f"{prefix}{machine[key]}" for key, prefix in named.items() if machine.get(key))]
    return ", ".join(filter(None, parts))


def _machines(rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = [r["machine"] for r in rows if r.get("kind") == "measured" and isinstance(r.get("machine"), dict)]
    return [*found, *([m] if (m := mapping(provenance.get("machine"))) else [])]


def _failure(record: Mapping[str, Any]) -> str:
    failure, ran, asked = record["failure"], mapping(record.get("ran")), mapping(record.get("asked"))
    where = f"{ran.get('framework', '?')}, {asked.get('model', '?')} on {asked.get('gpus', '?')}"
    return f"{where}: {failure.get('cause', '?')}: {failure.get('detail', '')}"


def files_of(section: Section) -> list[str]:
    """What its command leaves."""
    return [f"plots/out/{section.name}.svg", f"plots/out/{section.name}.png", f"results/{section.name}/summary.json"]


def relative(path: Path) -> str:
    """To the project, where it lies inside."""
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else path.name
