"""Source lines: the line of the user's code that a node of a graph, or an error of tracing, comes from."""

from __future__ import annotations

import linecache
import os
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

import torch
from torch import fx

_LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[2]))
"""Folders of torch and of this package, whose code is not the user's."""


class SourceLine(NamedTuple):
    """A line of a source file."""

    file: str
    line: int

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.line).strip()
        current_folder = os.getcwd() + os.sep
        return f"{self.file.removeprefix(current_folder)}:{self.line}" + (f": `{text}`" if text else "")


def innermost_user_line(frames: Iterable[tuple[str, int]]) -> SourceLine | None:
    """Return the last of (file, line), outermost call first, that is neither torch's nor this package's."""
    lines = [SourceLine(*f) for f in frames if not f[0].startswith((*_LIBRARIES, "<"))]
    return lines[-1] if lines else None


def call_stack(frame: FrameType | None) -> list[tuple[str, int]]:
    """Return (file, line) of a frame and of its callers, the outermost first."""
    lines = []
    while frame is not None:
        lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return lines[::-1]


def raised_at(traceback: TracebackType | None) -> SourceLine | None:
    """Return the line of the user's code at which an error was raised."""
    lines = []
    while traceback is not None:
        lines.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return innermost_user_line(lines)


def location(node: fx.Node) -> str:
    """Return `` (at FILE:LINE: `code`)`` of a node of a traced graph; empty if unknown."""
    return location_text(node.meta.get("source"))


def location_text(line: SourceLine | None) -> str:
    """Return `` (at FILE:LINE: `code`)`` of a source line; empty for None."""
    return "" if line is None else f" (at {line})"
