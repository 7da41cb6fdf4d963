"""Damaged and hostile files: how they are made from good ones, and what every reader owes to them.

`AXONN_FUZZ_EXAMPLES=2000` tries so many of each kind, other ones every time; without it a few, always the same.
"""

from __future__ import annotations

import copy
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from axonn.errors import AxonnError

T = TypeVar("T")
_ASKED = int(os.environ.get("AXONN_FUZZ_EXAMPLES", "0"))


def fuzz(examples: int) -> settings:
    """`examples` in the short profile: of a slow reader fewer."""
    return settings(
        max_examples=_ASKED or examples,
        derandomize=not _ASKED,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


ODD_TEXT = [
    *("", " ", "\0", "\n", "a\nb", "\x1b[2J", "\ud7ff", "../../etc/passwd", "/etc/passwd", "..", "-", "$(touch x)"),
    *("`id`", "'; rm -rf /", "${HOME}", "<script>alert(1)</script>", "[red]", "{{ 7 * 7 }}", "x" * 5000, "null", "nan"),
]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf"), [], {}, [[]], [{}], {"": ""}, {"a": {"b": [1, 2]}}, [1] * 3000),
]
odd = st.sampled_from(ODD_VALUES) | st.sampled_from(ODD_TEXT) | st.text(max_size=8) | st.integers()
"""What may stand in the place of a value."""
_PIECES = [
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b"\x1b[31m", b"\r", b"\t", b"{", b"}", b"[", b"]", b'"', b"'"),
    *(b": ", b"- ", b"&a ", b"*a", b"<<: *a\n", b"!!python/object/apply:os.system ['touch owned']", b"!!int x"),
    *(b"!!timestamp x", b"!!bool x", b"!!binary x", b"2001-99-99", b"0b_", b"NaN", b"-Infinity", b"1e999"),
    *(b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 5000, b'{"a":' * 5000, b"\n---\n", b"%YAML 9.9\n", b"x" * 20000),
]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that are cut, changed, lost, doubled, or came in from elsewhere."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(found)))
        match draw(st.sampled_from(["flip", "cut", "lose", "double", "insert", "line"])):
            case "flip" if at < len(found):
                found[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del found[at:]
            case "lose":
                del found[at : at + draw(st.integers(1, 64))]
            case "double":
                found[at:at] = found[at : at + draw(st.integers(1, 256))]
            case "insert":
                found[at:at] = draw(st.sampled_from(_PIECES))
            case "line":
                lines = bytes(found).split(b"\n")
                one = draw(st.integers(0, len(lines) - 1))
                other = draw(st.sampled_from([[], [lines[one]] * 2, [b"", lines[one]], [b"  " + lines[one]]]))
                lines[one : one + 1] = other
                found = bytearray(b"\n".join(lines))
            case _:
                pass
    return bytes(found)


def _places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from _places(value, (*place, key))


@st.composite
def altered(draw: st.DrawFn, data: Any) -> Any:
    """Plain data of which values were replaced, keys lost or renamed, or things were nested deeply."""
    found = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from([p for p in _places(found) if p] or [()]))
        if not place:
            return copy.deepcopy(draw(odd))
        holder = found
        for key in place[:-1]:
            holder = holder[key]
        key = place[-1]
        match draw(st.sampled_from(["replace", "lose", "rename", "nest", "repeat"])):
            case "lose":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from(ODD_TEXT) | st.text(max_size=4))] = holder.pop(key)
            case "nest":
                for _ in range(draw(st.sampled_from([1, 40, 200]))):
                    holder[key] = [holder[key]]
            case "repeat" if isinstance(holder, list):
                holder += [copy.deepcopy(holder[key])] * draw(st.integers(1, 3))
            case _:
                holder[key] = copy.deepcopy(draw(odd))
    return found


def read_or_refused(read: Callable[[], T], *, names: Path | str) -> T | None:
    """What was read; None where it was refused in words that name the file."""
    try:
        return read()
    except AxonnError as error:
        said = str(error)
        assert str(names) in said, said
        assert len(said) < 20_000, "the file fills the message"
        return None


def special_files(folder: Path, suffix: str = "") -> list[Path]:
    """What is no regular file, or is not there: reading these without a look first waits or never ends."""
    made = [folder / f"{name}{suffix}" for name in ("folder", "pipe", "zero", "loop", "absent", "empty")]
    directory, pipe, zero, loop, _, empty = made
    directory.mkdir()
    os.mkfifo(pipe)
    zero.symlink_to("/dev/zero")
    loop.symlink_to(loop)
    empty.write_bytes(b"")
    return [*made, folder / f"na\0me{suffix}"]


@contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """Inside of the block this process gets at most `more` bytes beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
