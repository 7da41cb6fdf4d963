"""The page of the report: figures, evidence, machines and commands in one HTML file.

The page needs nothing else: no network, no script, no other file. The same inputs give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from experiments.templates import rendered, sandbox
from plots.report import figure_sections
from plots.report.comparison_section import comparison
from plots.report.figure_sections import Picture, Section, files_of, picture_of
from plots.report.gpu_section import on_gpu
from plots.report.point_tables import KINDS
from plots.report.report_tables import Column, ReportTable, entry, numbers, table, texts
from plots.report.validation_section import published_sets, this_machine_runs

HERE = Path(__file__).parent
SCHEMATICS = {
    "grid": (
        "The process grid",
        "Which rank computes which part of the batch and of the network (the poster's Figure 1).",
    ),
    "schedule": (
        "The schedule",
        "Stages and microbatches over time, as the schedule orders them on a modelled clock (the poster's Figure 2).",
    ),
    "layer": ("A layer and the next", "How their weights are cut over the ranks of one stage (the poster's Figure 4)."),
}
"""Title and caption by the name of the file."""


@dataclass(frozen=True, kw_only=True)
class Schematic:
    """A schematic with its title and caption; `picture` is None where it has not been drawn."""

    title: str
    caption: str
    picture: Picture | None


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of the page's last table. `makes`: a part of the page; `leaves`: files, relative to the repository."""

    makes: str
    command: str
    leaves: list[str]


def render(sections: Sequence[Section] | None = None) -> str:
    """Return the whole page. `sections`: of its figures, by default of all."""
    sections = all_sections() if sections is None else sections
    poster = [s for s in sections if s.name in figure_sections.POSTER]
    small = [s for s in sections if s.name not in figure_sections.POSTER]
    schematics = [
        Schematic(title=title, caption=caption, picture=picture_of(f"schematic-{name}", f"{title}. {caption}"))
        for name, (title, caption) in SCHEMATICS.items()
    ]
    validation = published_sets()
    baselines = comparison()
    local = this_machine_runs()
    gpu = on_gpu()
    machines = [m for s in sections for m in s.machines]
    machines += [m for e in (baselines, local, gpu) if (m := e.machine) is not None]
    environment = sandbox([HERE], autoescape=True)
    environment.filters["marked"] = marked
    return rendered(
        environment,
        "report.html.j2",
        {
            "css": Markup((HERE / "report.css").read_text(encoding="utf-8")),
            "kinds": KINDS,
            "poster": poster,
            "small": small,
            "schematics": schematics,
            "validation": validation,
            "baselines": baselines,
            "local": local,
            "gpu": gpu,
            "machines": machine_table(machines),
            "commands": _commands(sections),
        },
    )


def all_sections() -> list[Section]:
    """Return the sections of all figures, made or not."""
    return [figure_sections.section(name) for name in figure_sections.names()]


def marked(text: str) -> Markup:
    """Return a text escaped, with backticked parts as code."""
    parts = re.split("`([^`]+)`", text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def machine_table(machines: Sequence[dict[str, Any]]) -> ReportTable:
    """Return the table of every machine that measured or drew something, each once, with all its commits."""
    distinct: dict[str, dict[str, Any]] = {}
    for machine in machines:
        key = repr(
            [
                machine.get(name)
                for name in ("cpu", "cores", "device", "driver", "cuda", "python", "torch", "mpi", "threads_per_rank")
            ]
        )
        known = distinct.setdefault(key, machine | {"commits": {}})
        if machine.get("commit"):
            known["commits"][str(machine["commit"])] = None
    rows = [m | {"commits": ", ".join(m["commits"]) or None} for m in distinct.values()]
    headings = {
        "cpu": "processor",
        "cores": "cores",
        "device": "device of the ranks",
        "driver": "driver",
        "cuda": "CUDA",
        "threads_per_rank": "threads per rank",
        "python": "Python",
        "torch": "torch",
        "mpi": "MPI",
        "commits": "commits of this suite (+: with changes)",
    }
    columns = [
        Column(heading=heading, value=entry(key), form=numbers if key in {"cores", "threads_per_rank"} else texts)
        for key, heading in headings.items()
    ]
    return table("Machines and versions behind the measured numbers", rows, columns)


def _commands(sections: Sequence[Section]) -> list[Command]:
    figures = [Command(makes=s.heading, command=s.command, leaves=files_of(s)) for s in sections]
    return [
        Command(makes="Everything below, and this page", command="make reproduce", leaves=["results/report.html"]),
        *figures,
        Command(makes="Schematics", command="make schematics", leaves=["plots/out/schematic-*.svg"]),
        Command(
            makes="The model against published measurements",
            command="axonn predict --validate",
            leaves=["results/predicted/validation.json"],
        ),
        Command(
            makes="Comparison with other frameworks",
            command="make compare-baselines",
            leaves=["results/baselines/summary.json", "plots/out/baselines.svg"],
        ),
        Command(
            makes="On a GPU",
            command="make bench-gpu",
            leaves=["results/gpu/summary.json", "results/measured/gpu.json", "plots/out/gpu.svg"],
        ),
        Command(
            makes="The model against runs on this machine",
            command="make validate-local",
            leaves=["results/local/validation.json"],
        ),
        Command(makes="This page alone, from what is there", command="make report", leaves=["results/report.html"]),
    ]
