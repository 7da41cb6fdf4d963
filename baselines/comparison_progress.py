"""Progress of a running comparison: a bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from math import isinf

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from axonn.cli import console
from baselines.coordinator import Say
from baselines.rounds import Widest

_LOG_WIDTH = 130


def make_console() -> Console:
    """Return a console as wide as the terminal, or as the tables in a log."""
    return console.make_console(width=_LOG_WIDTH)


def _interval(wide: Widest | None, names: Mapping[str, str]) -> str:
    if wide is None or isinf(wide.half_width):
        return ""
    return f"intervals within {wide.half_width:.1%} (widest: {names.get(wide.key, wide.key)}), "


class Reporter:
    """Printer of progress, group by group."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or make_console()

    @contextmanager
    def group(self, title: str, names: Mapping[str, str], *, seconds: float) -> Iterator[Say]:
        """Yield the `Say` that `take_turns` calls.

        `names` of the jobs by key; `seconds` that the group may take.
        """
        began = time.monotonic()
        last = -1
        rounds_began = began
        if not self._console.is_interactive:
            self._console.print(f"{title}: {', '.join(names.values())}", soft_wrap=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, disable=not self._console.is_interactive, transient=True) as bar:
            task = bar.add_task(escape(title), total=None)

            def say(activity: str, done: int, planned: int, wide: Widest | None) -> None:
                nonlocal last, rounds_began
                for key, name in names.items():
                    activity = activity.replace(key, name)
                if done < 0:
                    self._console.print(f"[red]{escape(title)}: {escape(activity)}[/red]", soft_wrap=True)
                    return
                now = time.monotonic()
                if planned and last < 0 and not done:
                    rounds_began = now
                left = (now - rounds_began) / done * (planned - done) if done else max(0.0, seconds - (now - began))
                limits = f"{_interval(wide, names)}at most {timedelta(seconds=round(left))} left"
                text = f"{title}: {activity}, {limits}"
                bar.update(task, description=escape(text), completed=done, total=planned or None)
                if done > last and planned:
                    last = done
                    if not self._console.is_interactive:
                        text = f"{title}: round {done + 1} of at most {planned}, {limits}"
                        self._console.print(text, soft_wrap=True, highlight=False)

            yield say
        spent = timedelta(seconds=round(time.monotonic() - began))
        self._console.print(f"{title}: done in {spent}", soft_wrap=True, highlight=False)
