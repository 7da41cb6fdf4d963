"""The layers of the code, by its imports: arrows point down only, and what must be pure is."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("axonn", "experiments", "baselines", "plots", "results", "jobscripts", "tests")

FORBIDDEN = [
    ("axonn", ("experiments", "baselines", "plots", "results", "jobscripts", "tests")),
    ("experiments", ("baselines", "plots", "jobscripts", "tests")),
    ("baselines", ("experiments.run_command", "experiments.runner", "plots", "jobscripts", "tests")),
    ("plots", ("baselines", "jobscripts", "tests")),
    # The performance model is arithmetic: no torch, no engine. An architecture hands over its outline in the words of
    # perf/layers; the registry finds it without importing torch.
    ("axonn/perf", ("torch", "mpi4py", "axonn.tensor", "axonn.inter_layer.executor", "axonn.inter_layer.stage")),
    ("axonn/perf", ("axonn.observability.traffic", "axonn.models.base", "axonn.distributed", "axonn.data")),
    ("axonn/models/registry.py", ("torch",)),
    ("axonn/config", ("torch", "axonn.models")),
    ("axonn/observability/traffic.py", ("axonn.perf", "axonn.engine")),
    (
        "axonn/schedules",
        ("torch", "numpy", "mpi4py", "time", "datetime", "threading", "asyncio", "random", "os", "pathlib", "sys"),
    ),
    ("axonn/distributed/transport/base.py", ("torch.distributed", "mpi4py")),
    ("axonn/distributed/transport/mpi.py", ("torch.distributed",)),
    ("axonn/grid.py", ("mpi4py",)),
]

FLOORS: list[tuple[str, ...]] = [
    ("errors",),
    ("durable_files", "config.loading", "spans"),
    ("grid", "placement", "config.model_config"),
    ("schedules", "device"),
    ("distributed",),
    # A configuration has the keys of the algorithm that it names.
    ("config", "optim.algorithms"),
    ("checkpoint", "observability"),
    ("tensor",),
    ("perf.layers",),
    ("models.*",),
    ("inter_layer", "data", "optim"),
    # An architecture brings its data; whoever asks for one by its kind gets all of it.
    ("models.gpt", "models.unet", "models.registry"),
    ("engine", "perf"),
    ("autoparallel",),
    ("training",),
    ("cli",),
]
"""The engine's modules from the ground up; an arrow points to the same floor or down. The longest name wins: a module
by its own, a package's file by the package's, what lies in it by `package.*` where that stands here, too."""


def files_of(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imports_of(path: Path) -> Iterable[tuple[int, str]]:
    """(line, full name) of everything that a file imports, inside of functions and type checks too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join([*package[: len(package) - node.level + 1], node.module or ""]) if node.level else ""
            module = module.rstrip(".") or node.module or ""
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def violations(place: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files_of(place)
        for line, name in imports_of(path)
        if any(is_inside(name, module) for module in forbidden)
    ]


@pytest.mark.parametrize(("place", "forbidden"), FORBIDDEN, ids=lambda value: value if isinstance(value, str) else None)
def test_imports_point_down_only(place: str, forbidden: tuple[str, ...]) -> None:
    assert files_of(place), f"{place} is empty: was it moved?"
    assert violations(place, forbidden) == []


def floor_of(module: str) -> int:
    """Number of the floor of one of the engine's modules, `axonn.` left out."""
    fits: list[tuple[int, int]] = []
    for number, names in enumerate(FLOORS):
        for name in names:
            inside = module.startswith(f"{name.removesuffix('*')}" if name.endswith("*") else f"{name}.")
            exact = ("models.gpt", "models.unet")
            if module == name or (inside and name not in exact):
                fits.append((len(name) + (module == name), number))
    assert fits, f"axonn.{module} has no floor"
    return max(fits)[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


ENGINE = [path for path in files_of("axonn") if module_of(path) not in ("axonn", "axonn.__main__")]


@pytest.mark.parametrize("path", ENGINE, ids=module_of)
def test_the_floors_of_the_engine_are_stacked(path: Path) -> None:
    known = {module_of(other) for other in files_of("axonn")}
    rising = []
    for line, name in imports_of(path):
        module = name if name in known else name.rpartition(".")[0]
        if module.startswith("axonn.") and floor_of(module[6:]) > floor_of(module_of(path)[6:]):
            rising.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert rising == []


def test_imports_are_found_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule can be broken: every way to import is seen."""
    monkeypatch.setattr("tests.test_layers.ROOT", tmp_path)
    folder = tmp_path / "axonn" / "perf"
    folder.mkdir(parents=True)
    (folder / "bad.py").write_text(
        "import torch.nn as nn\nfrom torch import optim\ndef f():\n    import torch\nfrom ..engine import Engine\n"
        "from .. import transport\nfrom . import kernels\nimport torchlike\n"
    )
    found = violations("axonn/perf", ("torch", "axonn.engine", "axonn.transport"))
    assert [line.rpartition(" ")[2] for line in found] == [
        "torch.nn",
        "torch.optim",
        "axonn.engine.Engine",
        "axonn.transport",
        "torch",
    ]


def test_the_pure_parts_call_no_clock_and_do_no_input_or_output() -> None:
    names = {"open", "print", "input", "exec", "eval"}
    for path in files_of("axonn/schedules"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in names, f"{path.name}:{node.lineno}"


def test_no_module_keeps_mutable_state() -> None:
    """Upper-case tables are constants by agreement; a lower-case list, dict or set at module level is state."""
    for place in ("axonn", "experiments"):
        for path in files_of(place):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                assert not isinstance(node, ast.Global)
                if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(
                    node.value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
                ):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    for target in targets:
                        name = ast.unparse(target)
                        assert name.isupper() or name == "__all__", f"{path.name}:{node.lineno}: {name}"


def test_every_package_is_covered_by_a_rule() -> None:
    found = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert found <= set(PACKAGES), "a new package needs a place in the layers"


MADE_OF_CODE = [path for name in PACKAGES if name != "tests" for path in files_of(name) if path.name == "__init__.py"]


@pytest.mark.parametrize("package", MADE_OF_CODE, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_every_package_says_what_it_is(package: Path) -> None:
    said = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8")))
    assert said, f"{package} has no docstring"
    assert "not written yet" not in said.lower()
