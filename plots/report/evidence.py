"""Evidence: a part of the report beside the figures, with its tables and what is lacking."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from plots.report.figure_sections import Picture
from plots.report.report_tables import ReportTable


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One part of the report. `lacking`: what is missing, each with the way to get it."""

    command: str
    lacking: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    tables: list[ReportTable] = field(default_factory=list)
    parts: list[DataSetEvidence] = field(default_factory=list)
    picture: Picture | None = None
    machine: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class DataSetEvidence:
    """One published data set beside the predictions."""

    name: str
    title: str
    source: str
    remarks: list[str]
    tables: list[ReportTable]


def minute_of(created: Any) -> str:
    """Return the day and minute of a record."""
    return str(created)[:16].replace("T", " ") + (" UTC" if str(created).endswith("+00:00") else "")
