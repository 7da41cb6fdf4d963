"""The report of the whole reproduction: python -m plots.report [--out results/report.html]

Reads the results of the figures, the validation and the comparison, and writes one page that needs nothing else: no
network, no script, no other file. What has not been made is named with its command. The same inputs give the same
bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from axonn.cli.console import make_console
from axonn.training.places import from_here
from plots import figure
from plots.report.report_page import all_sections, render


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m plots.report", description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write; default results/report.html")
    path: Path = parser.parse_args(arguments).out or figure.RESULTS / "report.html"
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
