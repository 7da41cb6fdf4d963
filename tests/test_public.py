"""The reference of the Python interface: everything public says what it is, and renders."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import axonn
from axonn.training.places import ROOT

INTERFACE = [
    "GPT",
    "AxonnError",
    "Engine",
    "GPTConfig",
    "ParallelModule",
    "ProcessGrid",
    "TrainConfig",
    "UNet",
    "UNetConfig",
    "make_schedule",
    "parallelize",
    "read_spans",
]
WITHOUT_TORCH = ["AxonnError", "GPTConfig", "ProcessGrid", "TrainConfig", "UNetConfig", "make_schedule", "read_spans"]
MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(axonn.__path__, "axonn.")
    if not any(part.startswith("_") for part in found.name.split("."))
)


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Name and object of what a module defines for others."""
    yield module.__name__, module
    for name, value in vars(module).items():
        ours = getattr(value, "__module__", None) == module.__name__
        if name.startswith("_") or not ours or not isinstance(value, type | FunctionType):
            continue
        yield f"{module.__name__}.{name}", value
        if isinstance(value, type):
            for method, one in vars(value).items():
                # What overrides something has its words.
                if not method.startswith("_") and isinstance(one, FunctionType | property | classmethod | staticmethod):
                    yield f"{module.__name__}.{name}.{method}", getattr(value, method)


def protocols() -> dict[str, bool]:
    """Methods of the project's protocols. What implements one has its words."""
    found: dict[str, bool] = {}
    for name in MODULES:
        for one in vars(importlib.import_module(name)).values():
            if isinstance(one, type) and getattr(one, "_is_protocol", False) and one.__module__.startswith("axonn"):
                found |= {method: bool(getattr(one, method).__doc__) for method in vars(one) if method[0] != "_"}
    return found


@pytest.mark.parametrize("name", ["axonn", *MODULES])
def test_everything_public_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)
    silent = [where for where, one in public(module) if not (inspect.getdoc(one) or "").strip()]
    implemented = protocols()
    assert [where for where in silent if not implemented.get(where.rpartition(".")[2])] == []


def test_the_package_offers_the_interface() -> None:
    assert axonn.__all__ == INTERFACE
    assert set(dir(axonn)) >= set(INTERFACE)
    for name in INTERFACE:
        assert getattr(axonn, name).__name__ == name
        assert f"`{name}`" in (axonn.__doc__ or ""), f"{name} is not in the package's docstring"
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(axonn, "no_such_name")  # noqa: B009


def test_the_interface_imports_torch_only_where_it_computes() -> None:
    code = (
        f"import sys, axonn\nfor name in {WITHOUT_TORCH}:\n    getattr(axonn, name)\n"
        "assert 'torch' not in sys.modules\naxonn.Engine\nassert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_reference_renders(tmp_path: Path) -> None:
    """`make docs`."""
    out = tmp_path / "reference"
    subprocess.run([sys.executable, "-m", "tools.reference", str(out)], cwd=ROOT, check=True, timeout=250)
    assert (out / "index.html").is_file()
    page = (out / "axonn" / "autoparallel" / "parallelize.html").read_text(encoding="utf-8")
    assert "example_inputs" in page
    assert "example_inputs" in (out / "axonn.html").read_text(encoding="utf-8")
    assert {path.relative_to(out).with_suffix("").as_posix().replace("/", ".") for path in out.rglob("*.html")} >= {
        name for name in MODULES if not hasattr(importlib.import_module(name), "__path__")
    }
