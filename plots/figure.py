"""The part that all figures share: summary, picture and tables from an experiment's records, and when to redraw.

A figure is one file of experiments/ and one module of plots/figures, which says what its summary has beside the rows,
draws the picture, and prints its tables. `make_figure` does the rest: points of every kind come from where that kind
lives and nowhere else (`plots.figure_records`), so none is ever drawn as another; whatever is missing is named in the
figure, in the summary and on the screen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape

from axonn.cli.console import make_console
from axonn.cli.doc_links import explained
from axonn.durable_files import read_json, replace_durably
from axonn.observability.machine_usage import BUSY_SHARE
from axonn.training.places import PROJECT, ROOT, from_here
from axonn.training.provenance import described_files, fingerprint, source_files, this_machine
from experiments.definition import Policy, load_experiment
from experiments.missing_frameworks import how_to_install, not_installed
from experiments.published_points import published_ratios
from plots import style
from plots.figure_records import Content, gather
from plots.summary import busy_points, failed, mape, not_run, rows_of, unknown_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = PROJECT / "results"
MOST_MISSING = 3
"""Number of missing points that the figure itself names; the summary has all of them."""


@dataclass(frozen=True, kw_only=True)
class FigureKind:
    """One figure. `name`: that of the experiment's file.

    `draw`: make the picture from the summary; called inside the style. `tables`: what is printed. `extras`: entries of
    the summary beside those that all figures have. `inputs`: files that it is drawn from beside the records; a change
    of one means a redraw. `lacks`: inputs that are missing, each with the way to get it. `outputs`: files that `draw`
    writes beside the picture.
    """

    name: str
    draw: Callable[[dict[str, Any], Content], Figure]
    tables: Callable[[dict[str, Any], Content], Iterable[RenderableType]]
    extras: Callable[[Content, list[dict[str, Any]]], dict[str, Any]] = field(default=lambda content, rows: {})
    inputs: Callable[[Content], Sequence[Path]] = field(default=lambda content: [])
    lacks: Callable[[Content], Sequence[str]] = field(default=lambda content: [])
    outputs: Callable[[Content], Sequence[Path]] = field(default=lambda content: [])
    command: str = ""
    """Command that makes the figure; default make reproduce-NAME."""


def summary_file(name: str) -> Path:
    """Return the path of the summary of the figure of this name."""
    return RESULTS / name / "summary.json"


def load_summary(name: str) -> dict[str, Any] | None:
    """Return the summary on disk; None where there is none, or the file is not an intact summary of this figure."""
    try:
        summary = read_json(summary_file(name))
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict) or summary.get("figure") != name:
        return None
    return summary if summary.get("sha256") in (None, _checksum(summary)) else None


def _checksum(summary: Mapping[str, Any]) -> str:
    """Return the checksum of a summary's content: a damaged or edited one is not taken for what was drawn."""
    content = {name: value for name, value in summary.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def summarise(kind: FigureKind, content: Content, *, with_busy: bool = False) -> dict[str, Any]:
    """Return the content of summary.json. `with_busy`: points measured while the machine was busy with other work take
    part in ratios, too."""
    experiment = content.experiment
    rows = rows_of(content.published, [*content.predicted, *content.measured], with_busy=with_busy)
    return {
        "figure": experiment.name,
        "title": experiment.title,
        "about": experiment.about,
        "differs": experiment.differs,
        "rows": rows,
        "mape_pct": mape(rows),
        **kind.extras(content, rows),
        "missing": content.missing,
        "busy": busy_points(rows),
        "busy_in_ratios": with_busy,
        "not_known_whether_busy": unknown_points(rows),
        "not_installed": not_installed(content.failures),
        "failures": [r.model_dump(mode="json", exclude_none=True) for r in content.failures],
        "policy": None if experiment.policy is None else _policy(experiment.policy, with_busy=with_busy),
        "provenance": _provenance(kind, content),
    }


def _policy(policy: Policy, *, with_busy: bool) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in ("batches", "warmup_batches", "repeats")} | {
        "batch_time_s": "mean over the batches after warm-up; over repeats the median",
        "busy": f"others took more than {BUSY_SHARE:.0%} of the core seconds; "
        + ("in ratios all the same" if with_busy else "left out of ratios, and of medians with other repeats"),
        "loss_tolerance": policy.loss_tolerance,
    }


def _provenance(kind: FigureKind, content: Content) -> dict[str, Any]:
    experiment = content.experiment
    sources = {record.source for record in content.published}
    sources |= {ratio.source for ratio in published_ratios(experiment)}
    sources |= {reading.source for reading in experiment.readings.values()}
    return {
        "command": kind.command or f"make reproduce-{kind.name}",
        "machine": this_machine().model_dump(exclude_none=True),
        "sources": sorted(sources),
        "records": {
            "published": experiment.published or experiment.data_set or experiment.ratios,
            "predicted": sorted({r.source for r in content.predicted}),
            "measured": sorted({str(r.run_folder) for r in content.measured if r.run_folder}),
        },
    }


def make_figure(
    kind: FigureKind, *, fresh: bool = False, with_busy: bool = False, console: Console | None = None
) -> int:
    """Write plots/out/NAME.png and .svg and results/NAME/summary.json, unless they are up to date; print the tables.

    They are up to date while nothing has changed that they are made from. `with_busy`: see `summarise`. Returns the
    exit status: 1 where something is missing.
    """
    console = console or make_console()
    content = gather(load_experiment(ROOT / "experiments" / f"{kind.name}.yaml"))
    content.missing.extend(kind.lacks(content))
    files = [style.OUT / f"{kind.name}.{ending}" for ending in ("png", "svg")]
    current = fingerprint(
        [[r.model_dump(mode="json") for r in content.records], content.missing, with_busy],
        [
            *source_files(kind.draw.__globals__["__spec__"].name),
            *described_files(f"experiments/{kind.name}.yaml"),
            *(ROOT / reading.file for reading in content.experiment.readings.values()),
            *kind.inputs(content),
        ],
    )
    complete = all(f.exists() for f in [*files, *kind.outputs(content)])
    summary = None if fresh or not complete else load_summary(kind.name)
    if summary is None or summary.get("fingerprint") != current or "sha256" not in summary:
        summary = summarise(kind, content, with_busy=with_busy) | {"fingerprint": current}
        with style.styled(kind.name):
            figure = kind.draw(summary, content)
            say_missing(figure, content.missing, summary["busy"])
            style.save(figure, kind.name)
        path = summary_file(kind.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        # JSON turns keys into strings, and the checksum is of what is read back.
        plain = json.loads(json.dumps(summary))
        replace_durably(path, json.dumps(plain | {"sha256": _checksum(plain)}, indent=1) + "\n")
    else:
        console.print("nothing to do: the figure is newer than all its records")
    for table in kind.tables(summary, content):
        console.print(table, soft_wrap=isinstance(table, str))
    for line in [*failed(content.failures), *not_run(content.failures)]:
        console.print(f"[yellow]{escape(line)}[/yellow]", soft_wrap=True)
    for line in content.missing:
        console.print(f"[yellow]missing: {escape(line)}[/yellow]", soft_wrap=True)
    for line in end_lines(summary, kind.name):
        console.print(f"[yellow]{escape(line)}[/yellow]", soft_wrap=True)
    outputs = [*files, summary_file(kind.name)]
    console.print(f"figure: {', '.join(map(from_here, outputs))}")
    return 1 if content.missing else 0


def end_lines(summary: Mapping[str, Any], name: str) -> list[str]:
    """Return the closing remarks on a figure, each with what to do: points measured on a busy machine, points of which
    that is unknown, frameworks that are not installed."""
    lines = []
    if busy := summary.get("busy"):
        lines.append(
            f"{len(busy)} point(s) measured while the machine was busy with other work ({'; '.join(busy)}): marked *, "
            + ("in ratios all the same" if summary.get("busy_in_ratios") else "left out of ratios (BUSY=1: in them)")
            + f"; when the machine is idle, measure them anew: make reproduce-{name} FRESH=busy"
        )
    if unknown := summary.get("not_known_whether_busy"):
        lines.append(
            f"not known whether the machine was busy: {len(unknown)} point(s) of records without it; measure them "
            f"anew to know: make reproduce-{name} FRESH=1"
        )
    if line := how_to_install(summary.get("not_installed") or {}):
        lines.append(line)
    return lines


def say_missing(figure: Figure, missing: Sequence[str], busy: Sequence[str] = ()) -> None:
    """Name what is not drawn, and what a busy machine measured, at the foot of the figure."""
    if not missing and not busy:
        return
    from matplotlib.font_manager import FontProperties

    width = int(figure.get_figwidth() * 22)
    text = "\n".join(
        part
        for heading, lines in (("missing", missing), ("machine busy", busy))
        for line in _first(lines)
        for part in wrap(f"{heading}: {line}", width)
    )
    # A legend without a title lies at the foot, too: the text becomes its title.
    if foot := next((legend for legend in figure.legends if not legend.get_title().get_text()), None):
        foot.set_title(text, prop=FontProperties(size=5.5))
        foot.get_title().set(color="firebrick", multialignment="center")
    else:
        figure.supxlabel(text, fontsize=5.5, color="firebrick")


def _first(lines: Sequence[str]) -> list[str]:
    """Return the first of these lines, and the number of further ones."""
    named = [line.partition(";")[0] for line in lines[:MOST_MISSING]]
    return [*named, f"and {len(lines) - MOST_MISSING} more"] if len(lines) > MOST_MISSING else named


def main(kind: FigureKind, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of a figure's module: --fresh draws it anew, --with-busy makes ratios also of what was
    measured on a busy machine."""
    parser = argparse.ArgumentParser(
        prog=f"python -m plots.figures.{kind.name}",
        description=f"Draws the figure of experiments/{kind.name}.yaml from the records that there are of it.",
    )
    parser.add_argument("--fresh", action="store_true", help="draw it anew even if nothing has changed")
    parser.add_argument("--with-busy", action="store_true", help="ratios also of what was measured on a busy machine")
    options = parser.parse_args(arguments)
    with explained("docs/own-figure.md"):
        status = make_figure(kind, fresh=options.fresh, with_busy=options.with_busy)
    if status:
        sys.exit(status)
