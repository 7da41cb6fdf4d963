from __future__ import annotations

import pytest
from rich.table import Table

from tests.bench.report import make_console


def pytest_terminal_summary(config: pytest.Config) -> None:
    """The figures that count, beside their targets."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    table = Table(title="figure beside its target (timings are benchmarks, not tests)")
    for name in ("what", "figure", "target", "reached"):
        table.add_column(name)
    for bench in session.benchmarks:
        info = bench.extra_info
        figure = bench.stats.median
        table.add_row(
            info["what"], f"{figure:.3f}", f"<= {info['target']:.2f}", "yes" if figure <= info["target"] else "no"
        )
    make_console().print(table)
