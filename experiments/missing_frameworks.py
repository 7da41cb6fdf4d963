"""Frameworks that were not run because they are not installed: their names, and the command that installs them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from axonn.observability.records import Record

INSTALL = "make baselines ONLY="
"""With the name of a framework's environment behind it, part of the reason why the framework is not there."""


def not_installed(records: Iterable[Record]) -> dict[str, str]:
    """Return the environment's name of each framework that a record says is not installed, by what it is called."""
    found: dict[str, str] = {}
    for record in records:
        if record.failure is not None and record.failure.cause == "unavailable":
            named = re.search(rf"{re.escape(INSTALL)}([\w-]+)", record.failure.detail)
            if named is not None:
                found[record.ran.framework] = named[1]
    return found


def how_to_install(names: Mapping[str, str]) -> str:
    """Return a line that names frameworks that are not installed with the command; empty where there are none."""
    if not names:
        return ""
    only = " ".join(dict.fromkeys(names.values()))
    return f'not installed, and not measured: {", ".join(names)}; {INSTALL}"{only}" installs them'
