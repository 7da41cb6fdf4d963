"""Files that survive a crash: either as they were or as they were meant to be; that strangers made; that are shared."""

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
"""Bytes of a text or JSON file that is read as a whole; none of ours comes near."""
LOCK = ".lock"
"""In a folder that one command at a time writes to: locked as long as it does."""
_LONGEST_NUMBER = 40
"""Digits of a whole number in a file."""


def reason_of(error: Exception, path: Path | str | None = None) -> str:
    """Return what went wrong, without the number and the path that Python adds: who reports it names the file.

    `path`: the file as the user named it; of one that is not there the reason says where it was looked for.
    """
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if not isinstance(error, FileNotFoundError) or path is None or os.path.isabs(path):
        return error.strerror
    return f"{error.strerror} (looked for {os.path.abspath(path)})"


def write_durably(path: Path, text: str) -> None:
    """Write a new file and wait until it is on disk. A crash may leave a part of it."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """Write or replace a file as a whole: a crash leaves the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_durably(temporary, text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
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


@contextmanager
def opened(path: Path | str) -> Iterator[BufferedReader]:
    """A regular file, to be read. Raises `OSError` for anything else, without waiting for a pipe or a device."""
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
    """The content of a regular file. Raises `OSError` for anything else, and for one of more than `most` bytes."""
    with opened(path) as file:
        # Files of /proc say that they are empty, so what is read counts, and not the size.
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"is larger than {most} bytes, which no file of this kind is", str(path))
    return content


def read_text(path: Path | str, *, most: int = LARGEST) -> str:
    """The same as UTF-8. Raises `UnicodeDecodeError` for something else."""
    return read_bytes(path, most=most).decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """Plain data. Raises `ValueError` for what is no JSON in UTF-8, nested too deeply, or has a key twice in an object
    or a number that nothing can be."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_once, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path | str) -> Any:
    """Plain data of a JSON file. Raises `OSError` and `ValueError`."""
    return parse_json(read_bytes(path))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"{digits[:8]}... is a number of {len(digits)} digits")
    return int(digits)


@contextmanager
def locked(path: Path, otherwise: str) -> Iterator[None]:
    """Nobody else has the lock of a file inside of the block; the file is made if need be.

    A process that ends, however it does, gives its locks back. Raises `LaunchError` saying `otherwise`.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LaunchError(otherwise) from error
        except OSError:
            pass  # A file system without locks.
        yield


@contextmanager
def locked_folder(folder: Path, otherwise: str = "wait for its end") -> Iterator[None]:
    """Nobody else who asks for it uses `folder` inside of the block; it is made if need be. Raises `LaunchError`."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, f"another run uses {folder}; {otherwise}"):
        yield
