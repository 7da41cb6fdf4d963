"""Sandboxed templates, since users may bring their own: they see the values they are given, and nothing else of Python
or of the disk."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import BaseLoader, Environment, FileSystemLoader, StrictUndefined, TemplateError, TemplateNotFound
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from axonn.errors import ConfigError

_LONGEST = 1_000_000
"""Most letters or items of a product in a template."""
_LARGEST_POWER = 64
_HINT = "what a template may use is in the one that comes with the suite"


class _Inside(FileSystemLoader):
    """Loader of templates from folders, the first one that has the name; links that lead out of them do not count."""

    def get_source(self, environment: Environment, template: str) -> tuple[str, str, Callable[[], bool]]:
        source, filename, unchanged = super().get_source(environment, template)
        path = Path(filename).resolve()
        if not any(path.is_relative_to(Path(folder).resolve()) for folder in self.searchpath):
            raise TemplateNotFound(template, f"{filename} leads out of its folder")
        return source, filename, unchanged


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and not (numbers and abs(right) <= _LARGEST_POWER):
            raise SecurityError(f"a power of more than {_LARGEST_POWER}")
        if operator == "*" and not numbers:
            sized, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if not isinstance(times, int) or len(sized) * times > _LONGEST:
                raise SecurityError(f"a product of more than {_LONGEST} letters or items")
        return super().call_binop(context, operator, left, right)


def sandbox(folders: Sequence[Path], *, autoescape: bool, keep_trailing_newline: bool = False) -> Environment:
    """Return an environment with the templates of `folders`; those of earlier folders come first. A value that is not
    given is an error."""
    loader: BaseLoader = _Inside(list(folders))
    return _Sandbox(
        loader=loader,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=keep_trailing_newline,
        autoescape=autoescape,
    )


def rendered(environment: Environment, name: str, values: dict[str, Any]) -> str:
    """Render the template of this name. Raises `ConfigError` naming its file and line."""
    try:
        return environment.get_template(name).render(values)
    except TemplateError as error:
        place = _place(environment, error) or name
        hint = "correct the template" if getattr(error, "lineno", None) else _HINT
        raise ConfigError(f"{place}: {error.message}; {hint}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, MemoryError, RecursionError) as error:
        place = _place(environment, error) or name
        raise ConfigError(f"{place}: {type(error).__name__}: {error}; {_HINT}") from error


def _place(environment: Environment, error: Exception) -> str | None:
    """Return file and line of the template in which an error occurred, as far as they are known."""
    if getattr(error, "lineno", None) and getattr(error, "filename", None):
        return f"{error.filename}, line {error.lineno}"  # type: ignore[attr-defined]
    loader = environment.loader
    folders = loader.searchpath if isinstance(loader, FileSystemLoader) else []
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if any(Path(frame.filename).is_relative_to(folder) for folder in folders) and not frame.filename.endswith(".py")
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None
