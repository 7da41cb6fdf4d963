"""The line of the user's code that a node of a graph, or an error of tracing, comes from."""

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
"""Folders of torch and of this package: code that users did not write."""


class SourceLine(NamedTuple):
    """A line of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.line).strip()
        here = os.getcwd() + os.sep
        return f"{self.file.removeprefix(here)}:{self.line}" + (f": `{text}`" if text else "")


def innermost(frames: Iterable[tuple[str, int]]) -> SourceLine | None:
    """The last of (file, line), the outermost call first, that is neither torch's nor this package's."""
    found = [SourceLine(*f) for f in frames if not f[0].startswith((*_LIBRARIES, "<"))]
    return found[-1] if found else None


def calling(frame: FrameType | None) -> list[tuple[str, int]]:
    """(file, line) of a frame and of all that called it, the outermost first."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return found[::-1]


def raised_at(traceback: TracebackType | None) -> SourceLine | None:
    """The line of the user's code at which an error was raised."""
    found = []
    while traceback is not None:
        found.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return innermost(found)


def at(node: fx.Node) -> str:
    """`` (at FILE:LINE: `code`)`` of a node of a traced graph; empty where it is not known."""
    return shown(node.meta.get("source"))


def shown(line: SourceLine | None) -> str:
    """`` (at FILE:LINE: `code`)``, or nothing."""
    return "" if line is None else f" (at {line})"
