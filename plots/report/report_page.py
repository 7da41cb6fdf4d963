"""The report of the whole reproduction: python -m plots.report.report_page [--out results/report.html]

Reads what the figures, the validation and the comparison have left, and writes one page that needs nothing else: no
network, no script, no other file. What has not been made is named with its command. The same inputs give the same
bytes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from axonn.cli.console import make_console
from axonn.training.places import from_here
from experiments.templates import rendered, sandbox
from plots import figure
from plots.report import evidence, figure_sections, gpu_section
from plots.report.figure_sections import Picture, Section, files_of, picture_of
from plots.report.point_tables import KINDS
from plots.report.report_tables import Column, ReportTable, numbers, table, texts

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
    title: str
    caption: str
    picture: Picture | None


@dataclass(frozen=True, kw_only=True)
class Command:
    """`leaves`: files, relative to the repository."""

    what: str
    command: str
    leaves: list[str]


def render(sections: Sequence[Section] | None = None) -> str:
    """The whole page. `sections`: of its figures, by default of all."""
    sections = all_sections() if sections is None else sections
    poster = [s for s in sections if s.name in figure_sections.POSTER]
    small = [s for s in sections if s.name not in figure_sections.POSTER]
    schematics = [
        Schematic(title=title, caption=caption, picture=picture_of(f"schematic-{name}", f"{title}. {caption}"))
        for name, (title, caption) in SCHEMATICS.items()
    ]
    validation = evidence.published_sets()
    baselines = evidence.comparison()
    local = evidence.this_machine_runs()
    gpu = gpu_section.on_gpu()
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
    """Of all figures, made or not."""
    return [figure_sections.section(name) for name in figure_sections.names()]


def marked(text: str) -> Markup:
    """Escaped, with what stands between backticks as code."""
    parts = re.split("`([^`]+)`", text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def machine_table(machines: Sequence[dict[str, Any]]) -> ReportTable:
    """Every machine that measured or drew something, once; commits are told together."""
    found: dict[str, dict[str, Any]] = {}
    for machine in machines:
        key = repr(
            [
                machine.get(name)
                for name in ("cpu", "cores", "device", "driver", "cuda", "python", "torch", "mpi", "threads_per_rank")
            ]
        )
        mine = found.setdefault(key, machine | {"commits": {}})
        if machine.get("commit"):
            mine["commits"][str(machine["commit"])] = None
    rows = [m | {"commits": ", ".join(m["commits"]) or None} for m in found.values()]
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
        Column(
            heading=heading,
            value=lambda m, key=key: m.get(key),
            form=numbers if key in {"cores", "threads_per_rank"} else texts,
        )  # type: ignore[misc]
        for key, heading in headings.items()
    ]
    return table("Machines and versions behind the measured numbers", rows, columns)


def _commands(sections: Sequence[Section]) -> list[Command]:
    own = [Command(what=s.heading, command=s.command, leaves=files_of(s)) for s in sections]
    return [
        Command(what="Everything below, and this page", command="make reproduce", leaves=["results/report.html"]),
        *own,
        Command(what="Schematics", command="make schematics", leaves=["plots/out/schematic-*.svg"]),
        Command(
            what="The model against published measurements",
            command="axonn predict --validate",
            leaves=["results/predicted/validation.json"],
        ),
        Command(
            what="Comparison with other frameworks",
            command="make compare-baselines",
            leaves=["results/baselines/summary.json", "plots/out/baselines.svg"],
        ),
        Command(
            what="On a GPU",
            command="make bench-gpu",
            leaves=["results/gpu/summary.json", "results/measured/gpu.json", "plots/out/gpu.svg"],
        ),
        Command(
            what="The model against runs on this machine",
            command="make validate-local",
            leaves=["results/local/validation.json"],
        ),
        Command(what="This page alone, from what is there", command="make report", leaves=["results/report.html"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m plots.report.report_page", description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write; default results/report.html")
    given = parser.parse_args(arguments)
    path: Path = given.out or figure.RESULTS / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    sections = all_sections()
    temporary.write_text(render(sections), encoding="utf-8")
    temporary.replace(path)
    console = make_console()
    for section in sections:
        if not section.made:
            console.print(
                f"not in the report: {section.heading}; run: {section.command}", highlight=False, soft_wrap=True
            )
    size = path.stat().st_size / 1e6
    console.print(f"report: {from_here(path)} ({size:.1f} MB)", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1:])
