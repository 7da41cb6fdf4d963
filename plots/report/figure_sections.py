"""One figure in the report: the content of its summary as a section with tables."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from axonn.errors import AxonnError
from axonn.training.places import ROOT
from experiments.definition import load_experiment
from plots import figure, style
from plots.figure import end_lines
from plots.report.extras import column_of
from plots.report.point_tables import KINDS, KNOWN, WOVEN_IN, tables_of
from plots.report.report_tables import NOTHING, ReportTable, fixed, is_number, mapping, strings

POSTER = ("fig3", "fig5", "fig6", "fig7")
"""Figures of the poster, in the order of the page."""
LARGEST_VECTOR = 600_000
"""Bytes of an SVG above which the bitmap is shown instead, if that is smaller."""
MOST_FOLDERS = 3
"""Run folders that are all named; of more, the first and the last."""
_CSS_PX = {"pt": 4 / 3, "px": 1.0, "in": 96.0, "": 1.0}
_SCALE = 1.35
"""Magnification on a screen of pictures, which are drawn for paper."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture inside the page. `source`: its file as a data URI. Width and height are CSS pixels."""

    source: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """The section of one figure. `made`: there is a summary. `status`: a phrase."""

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
    """Commands, each with the entries of `missing` that it makes; an empty command for the rest."""
    failed: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    to_know: list[str] = field(default_factory=list)
    """Points measured on a busy machine, and frameworks that are not installed, each with what to do."""
    provenance: list[tuple[str, list[str]]] = field(default_factory=list)
    machines: list[dict[str, Any]] = field(default_factory=list)


def names() -> list[str]:
    """Return the names of all figures: the poster's, then those of other experiments, then other summaries."""
    # An experiment without a figure's module is the user's.
    drawn = {path.stem for path in (ROOT / "plots" / "figures").glob("*.py")}
    suite = {path.stem for path in (ROOT / "experiments").glob("*.yaml")} & drawn
    made = {path.parent.name for path in figure.RESULTS.glob("*/summary.json") if figure.load_summary(path.parent.name)}
    made.discard("baselines")
    return [*POSTER, *sorted((suite | made) - set(POSTER))]


def section(name: str) -> Section:
    """Return the section of a figure. One not made yet, or with an unusable summary, says so and how to make it."""
    summary = figure.load_summary(name)
    if summary is None or not isinstance(summary.get("rows", []), list):
        return _section_not_made(name)
    described_title, described_about, described_differs = _described(name)
    title = str(summary.get("title") or described_title or name)
    rows = [row for row in summary.get("rows", []) if isinstance(row, dict)]
    provenance = mapping(summary.get("provenance"))
    heading = f"Figure {name.removeprefix('fig')}: {title}" if name in POSTER else title
    missing = strings(summary.get("missing"))
    failed, not_run = _failures(summary)
    counts = {kind: sum(row.get("kind") == kind for row in rows) for kind in KINDS}
    counts = {kind: count or _other_points(summary, kind) for kind, count in counts.items()}
    drawn = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    picture = picture_of(name, f"{heading}. Drawn are {drawn or 'no'} points; the tables below have their numbers.")
    return Section(
        name=name,
        heading=heading,
        title=title,
        command=str(provenance.get("command") or _command(name)),
        made=True,
        status=_status(summary, missing=missing, failed=failed, picture=picture),
        about=str(summary.get("about") or described_about or ""),
        differs=strings(summary.get("differs")) or described_differs,
        picture=picture,
        drawn=f"Points: {drawn}." if drawn else "No points.",
        counts=counts,
        mean_error=_mean_error(summary),
        remarks=_remarks(summary),
        tables=[t for t in tables_of(summary, rows) if t.rows],
        missing=missing,
        ways=ways_to(missing),
        failed=failed,
        to_know=_to_know(summary, name),
        not_run=not_run,
        provenance=_provenance(name, summary, provenance),
        machines=_machines(rows, provenance),
    )


def _section_not_made(name: str) -> Section:
    title, about, differs = _described(name)
    problem = "has a summary that is none" if figure.summary_file(name).exists() else "not made"
    number = f"Figure {name.removeprefix('fig')}" + (f": {title}" if title else "")
    return Section(
        name=name,
        heading=number if name in POSTER else title or name,
        title=title or name,
        command=_command(name),
        made=False,
        status=f"{problem}: {_command(name)}",
        about=about,
        differs=differs,
    )


def _command(name: str) -> str:
    return f"make reproduce-{name}"


def _failures(summary: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return a line for each run that failed, and one for each framework that was not run."""
    failures = [f for f in summary.get("failures") or [] if isinstance(f, dict) and isinstance(f.get("failure"), dict)]
    unavailable = [f for f in failures if f["failure"].get("cause") == "unavailable"]
    failed = [_failure(f) for f in failures if f["failure"].get("cause") != "unavailable"]
    return failed, list(dict.fromkeys(map(_failure, unavailable)))


def _status(
    summary: Mapping[str, Any], *, missing: Sequence[str], failed: Sequence[str], picture: Picture | None
) -> str:
    """Return what a figure lacks, as a phrase."""
    busy, absent = strings(summary.get("busy")), mapping(summary.get("not_installed"))
    unknown = strings(summary.get("not_known_whether_busy"))
    problems = [
        f"{len(missing)} missing" if missing else "",
        f"{len(failed)} failed" if failed else "",
        f"{len(busy)} measured on a busy machine" if busy else "",
        f"of {len(unknown)} not known whether the machine was busy" if unknown else "",
        f"not installed: {', '.join(map(str, absent))}" if absent else "",
        "" if picture else "picture missing",
    ]
    return "; ".join(filter(None, problems)) or "complete"


def _to_know(summary: Mapping[str, Any], name: str) -> list[str]:
    """Return the closing remarks of a figure, whatever form its summary has."""
    absent = mapping(summary.get("not_installed"))
    return end_lines(
        {
            "busy": strings(summary.get("busy")),
            "busy_in_ratios": summary.get("busy_in_ratios"),
            "not_known_whether_busy": strings(summary.get("not_known_whether_busy")),
            "not_installed": {str(label): str(install) for label, install in absent.items()},
        },
        name,
    )


def ways_to(missing: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return what is missing, by the command behind '; run: '."""
    by_command: dict[str, list[str]] = {}
    for line in missing:
        problem, _, command = line.partition("; run: ")
        by_command.setdefault(command, []).append(problem)
    return list(by_command.items())


def _described(name: str) -> tuple[str, str, list[str]]:
    """Return title, about and differs of the experiment; empty where there is none."""
    try:
        experiment = load_experiment(ROOT / "experiments" / f"{name}.yaml")
    except (AxonnError, OSError):
        return "", "", []
    return experiment.title, experiment.about, experiment.differs


def picture_of(name: str, alt: str) -> Picture | None:
    """Return the picture of this name in plots/out; None where there is none."""
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
    if start is None:
        return None
    lengths = [re.search(rb'\b%s="([0-9.]+)(pt|px|in|)"' % name, start[0]) for name in (b"width", b"height")]
    pixels = [float(length[1]) * _CSS_PX[length[2].decode()] for length in lengths if length]
    return (pixels[0], pixels[1]) if len(pixels) == 2 else None


def _png_size(content: bytes) -> tuple[float, float] | None:
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        return None
    width, height = struct.unpack(">II", content[16:24])
    # Bitmaps have 300 dots per inch (`plots.style.save`).
    return width * 96 / 300, height * 96 / 300


def _mean_error(summary: Mapping[str, Any]) -> str:
    error = mapping(mapping(summary.get("mape_pct")).get("predicted")).get("all", summary.get("phase_mape_pct"))
    return f"{fixed(error, 1)}%" if is_number(error) else NOTHING


def _other_points(summary: Mapping[str, Any], kind: str) -> int:
    """Return the number of points of a kind that are no batch times, from the figure's first table that has some."""
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
    """Return the mean errors, and wrong orders, as sentences."""
    lines = []
    for kind, errors in mapping(summary.get("mape_pct")).items():
        each = {name: value for name, value in mapping(errors).items() if is_number(value)}
        if "all" in each:
            parts = [f"{name} {fixed(value, 1)}%" for name, value in each.items() if name != "all"]
            by_framework = f" ({', '.join(parts)})" if len(parts) > 1 else ""
            lines.append(f"Mean absolute error of the {kind} points: {fixed(each['all'], 1)}%{by_framework}.")
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
    """Return the number of rows of a kind."""
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
    return [(label, lines) for label, lines in entries if lines]


def shortened(folders: Sequence[str]) -> list[str]:
    """Return the run folders; of many, the first and the last."""
    if len(folders) <= MOST_FOLDERS:
        return list(folders)
    return [f"{folders[0]} to {folders[-1]} ({len(folders)} run folders)"]


def machine_text(machine: Mapping[str, Any]) -> str:
    """Return cores, versions and commit in one line."""
    cores = f"{machine['cores']} cores of {machine.get('cpu', 'unknown')}" if machine.get("cores") else ""
    named = {"device": "", "python": "Python ", "torch": "torch ", "mpi": "", "commit": "commit "}
    parts = [cores, *(f"{prefix}{machine[key]}" for key, prefix in named.items() if machine.get(key))]
    return ", ".join(filter(None, parts))


def _machines(rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    measured_on = [r["machine"] for r in rows if r.get("kind") == "measured" and isinstance(r.get("machine"), dict)]
    return [*measured_on, *([m] if (m := mapping(provenance.get("machine"))) else [])]


def _failure(record: Mapping[str, Any]) -> str:
    failure, ran, asked = record["failure"], mapping(record.get("ran")), mapping(record.get("asked"))
    where = f"{ran.get('framework', '?')}, {asked.get('model', '?')} on {asked.get('gpus', '?')}"
    return f"{where}: {failure.get('cause', '?')}: {failure.get('detail', '')}"


def files_of(section: Section) -> list[str]:
    """Return the files that a section's command leaves."""
    return [f"plots/out/{section.name}.svg", f"plots/out/{section.name}.png", f"results/{section.name}/summary.json"]
