"""Careful file access: writes that survive a crash, reads of files that others have made, locks on shared files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from axonn.errors import LaunchError

LARGEST = 256 * 2**20
"""Most bytes of a text or JSON file, which is read at once; none of ours comes near."""
LOCK = ".lock"
"""Name of the lock file in a folder that only one command at a time may write to."""
_LONGEST_NUMBER = 40
"""Most digits of an integer in a file."""


def reason_of(error: Exception, path: Path | str | None = None) -> str:
    """Return what went wrong, without the error number and the path that Python adds: the caller names the file.

    `path`: the file as the user named it; for a missing file the reason says where it was looked for.
    """
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if not isinstance(error, FileNotFoundError) or path is None or os.path.isabs(path):
        return error.strerror
    return f"{error.strerror} (looked for {os.path.abspath(path)})"


def write_durably(path: Path, text: str) -> None:
    """Write a new file and wait until it is on disk. A crash may leave part of it."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """Write or replace a file atomically: a crash leaves either the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_durably(temporary, text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def regular_file(path: Path) -> Path:
    """Return `path` if it is a regular file: no link out of its folder, no pipe or device that would block a reader.

    Raises `OSError` otherwise.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def sync(path: Path) -> None:
    """Wait until the content of a closed file, or the entries of a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def opened(path: Path | str) -> Iterator[BufferedReader]:
    """Open a regular file for reading. Raises `OSError` for anything else, without blocking on a pipe or a device."""
    try:
        # A pipe that nobody writes into would keep a plain open waiting.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no name of a file ({error})") from error
    with open(handle, "rb") as file:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "is a device, a pipe or a socket, and no file", str(path))
        yield file


def read_bytes(path: Path | str, *, most: int = LARGEST) -> bytes:
    """Return the content of a regular file. Raises `OSError` for anything else and for more than `most` bytes."""
    with opened(path) as file:
        # Files in /proc report size 0, so the bytes read count, not the size.
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"is larger than {most} bytes, which no file of this kind is", str(path))
    return content


def read_text(path: Path | str, *, most: int = LARGEST) -> str:
    """Return the text of a regular file. Raises `OSError` as `read_bytes`, `UnicodeDecodeError` if it is not UTF-8."""
    return read_bytes(path, most=most).decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON into plain data.

    Raises `ValueError` for text that is not JSON in UTF-8, is nested too deeply, repeats a key in an object, or has an
    integer of more than 40 digits.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_unique_keys, parse_int=_bounded_int)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path | str) -> Any:
    """Return the plain data of a JSON file. Raises `OSError` as `read_bytes` and `ValueError` as `parse_json`."""
    return parse_json(read_bytes(path))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return mapping


def _bounded_int(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"{digits[:8]}... is a number of {len(digits)} digits")
    return int(digits)


@contextmanager
def locked(path: Path, otherwise: str) -> Iterator[None]:
    """Hold the lock of a file inside the block; the file is created if it does not exist.

    The lock is released when the process ends, however it ends. Raises `LaunchError` with the message `otherwise` when
    another process holds it.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LaunchError(otherwise) from error
        except OSError:
            pass  # The file system has no locks.
        yield


@contextmanager
def locked_folder(folder: Path, otherwise: str = "wait for its end") -> Iterator[None]:
    """Hold the lock of `folder`, created if need be, inside the block. Raises `LaunchError` when another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, f"another run uses {folder}; {otherwise}"):
        yield
