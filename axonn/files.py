"""Files that survive a crash: either as they were or as they were meant to be."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write a new file and wait until it is on disk. A crash may leave a part of it."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """Write or replace a file as a whole: a crash leaves the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_durably(temporary, text)
    temporary.replace(path)
    sync(path.parent)


def regular_file(path: Path) -> Path:
    """`path`, if it is a file by itself: no link out of its folder, and no pipe or device on which reading waits.

    Raises `OSError`.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def sync(path: Path) -> None:
    """Wait until the content of a file that was closed, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
