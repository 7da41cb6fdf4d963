"""Frameworks that did not run because they are not installed, and the command that installs them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from axonn.observability.records import Record

INSTALL = "make baselines ONLY="
"""Command that, with the name of an environment appended, installs a framework; part of the reason of a failure."""


def not_installed(records: Iterable[Record]) -> dict[str, str]:
    """Return the name of the environment of each framework that is not installed by these records, by framework."""
    environments: dict[str, str] = {}
    for record in records:
        if record.failure is not None and record.failure.cause == "unavailable":
            named = re.search(rf"{re.escape(INSTALL)}([\w-]+)", record.failure.detail)
            if named is not None:
                environments[record.ran.framework] = named[1]
    return environments


def how_to_install(names: Mapping[str, str]) -> str:
    """Return a line with the frameworks that are not installed and the command; empty where there are none."""
    if not names:
        return ""
    only = " ".join(dict.fromkeys(names.values()))
    return f'not installed, and not measured: {", ".join(names)}; {INSTALL}"{only}" installs them'
