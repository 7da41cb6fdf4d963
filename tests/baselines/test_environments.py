"""Environments of other frameworks: what is pinned, what is said of one that is missing, how they are installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from axonn.errors import LaunchError
from baselines import environments
from baselines.adapters import reference
from baselines.adapters.deepspeed import deepspeed_adapter
from baselines.adapters.megatron import megatron_adapter
from baselines.environments import LOCKS, Environment
from experiments.definition import ROOT

ENVIRONMENTS = [module.ENVIRONMENT for module in (deepspeed_adapter, megatron_adapter, reference)]


def pinned(path: Path) -> dict[str, str]:
    """Versions by package; a line that pins nothing is an error."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
        assert match, f"{path.name}: '{line}' pins no version, or a build of it"
        assert match[1].lower() not in found, line
        found[match[1].lower()] = match[2]
    return found


def test_every_environment_has_a_list() -> None:
    assert {path.stem for path in LOCKS.iterdir()} == {environment.name for environment in ENVIRONMENTS}


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda environment: environment.name)
def test_lists_pin_the_framework_and_the_torch_of_the_suite(environment: Environment) -> None:
    versions = pinned(LOCKS / f"{environment.name}.txt")
    assert environment.distribution in versions
    assert versions["torch"] == pinned(ROOT / "constraints.txt")["torch"]
    # What every rank script imports.
    assert "safetensors" in versions


def test_no_framework_is_in_the_suites_own_environment() -> None:
    assert not {environment.distribution for environment in ENVIRONMENTS} & set(pinned(ROOT / "constraints.txt"))


def make_installed(folder: Path, versions: Mapping[str, str]) -> None:
    """An environment that nothing runs in."""
    for name, version in versions.items():
        info = folder / "lib" / "python3.11" / "site-packages" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()


def test_an_environment_says_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "FOLDER", tmp_path / ".baselines")
    thing = Environment("thing", "thing-core")
    make_installed(thing.folder, {"thing_core": "1.2", "torch": "2.13.0+cpu"})
    assert thing.missing is None
    assert thing.version() == "thing-core 1.2, torch 2.13.0+cpu"
    assert thing.installed("nothing") is None
    assert thing.mpiexec is None
    (thing.folder / "bin" / "mpiexec").touch()
    assert thing.mpiexec == str(thing.folder / "bin" / "mpiexec")


def test_an_environment_that_is_not_there_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "FOLDER", tmp_path / ".baselines")
    thing = Environment("thing", "thing-core")
    assert thing.missing == "thing-core is not installed; make baselines ONLY=thing installs it (.baselines/thing)"
    make_installed(thing.folder, {"torch": "2.13.0"})
    assert "is not installed" in (thing.missing or ""), "an environment without its framework is none"
    with pytest.raises(LaunchError, match="make baselines"):
        thing.version()
    thing.log.touch()
    assert ".baselines/thing.log says why" in (thing.missing or "")
    make_installed(tmp_path / "other", {"thing_core": "1.2"})
    (tmp_path / "other" / "bin" / "python").unlink()
    (tmp_path / "other").rename(tmp_path / ".baselines" / "moved")
    assert Environment("moved", "thing-core").missing is not None, "it has no interpreter"


@dataclass
class Installer:
    """`tools/baselines.sh` with packages of our own making, in a folder of its own."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    first: subprocess.CompletedProcess[str] = field(init=False)
    """What came of the first call."""

    def __post_init__(self) -> None:
        for name in ("wheels", "locks", "scripts"):
            (self.folder / name).mkdir()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | {
            "BASELINES": str(self.folder / "installed"),
            "LOCKS": str(self.folder / "locks"),
            "SCRIPTS": str(self.folder / "scripts"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.folder / "wheels"),
        }

    def offer(self, name: str, version: str) -> None:
        """A wheel of an empty package."""
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(self.folder / "wheels" / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", f"__version__ = '{version}'\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    def pin(self, name: str, *lines: str) -> None:
        (self.folder / "locks" / f"{name}.txt").write_text("# Made up.\n" + "".join(f"{line}\n" for line in lines))

    def run(self, *names: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(ROOT / "tools" / "baselines.sh"), sys.executable, *names],
            env=self.environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    def version(self, name: str) -> str:
        """What `import name` says in the environment of that name."""
        code = f"import {name}, torch; print({name}.__version__, torch.__version__)"
        python = self.folder / "installed" / name / "bin" / "python"
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def installer(tmp_path_factory: pytest.TempPathFactory) -> Installer:
    """One that has `thing` installed, after another that cannot be."""
    made = Installer(tmp_path_factory.mktemp("installer"))
    made.offer("torch", "2.13.0")
    made.offer("thing", "1.0")
    made.offer("thing", "2.0")
    made.pin("thing", "thing==1.0", "torch==2.13.0")
    made.pin("broken", "nonesuch==1.0", "torch==2.13.0")
    made.first = made.run("broken", "thing")
    return made


def test_one_that_cannot_be_installed_does_not_keep_the_others_away(installer: Installer) -> None:
    first = installer.first
    assert first.returncode == 1
    assert "broken: not installed" in first.stderr
    assert "nonesuch==1.0" in first.stderr, "pip's own reason"
    assert "not usable: broken" in first.stderr
    assert "thing: installed" in first.stdout
    assert installer.version("thing").endswith(" 2.13.0")
    assert [path.name for path in (installer.folder / "installed").glob("*.log")] == ["broken.log"]


def test_what_agrees_with_the_list_is_left_alone(installer: Installer) -> None:
    mark = installer.folder / "installed" / "thing" / "mark"
    mark.touch()
    second = installer.run("thing")
    assert (second.returncode, second.stdout) == (0, "thing: is there\n")
    assert mark.exists()
    installer.pin("thing", "thing==2.0", "torch==2.13.0")
    assert installer.run("thing").returncode == 0
    assert installer.version("thing") == "2.0 2.13.0"
    assert not mark.exists(), "it is made anew"


def test_what_a_framework_compiles_is_compiled_once(installer: Installer) -> None:
    (installer.folder / "scripts" / "thing_build.py").write_text(
        "import pathlib, sys, thing\n"
        "path = pathlib.Path(sys.prefix, 'compiled')\n"
        "path.write_text((path.read_text() if path.exists() else '') + 'once')\n"
    )
    before = installer.version("thing")
    without = installer.run("thing", CXX="no-such-compiler")
    assert without.returncode == 1
    assert "there is no C++ compiler ('no-such-compiler'): install one" in without.stderr
    assert installer.version("thing") == before, "the rest of it is there"
    for _ in range(2):
        assert installer.run("thing", CXX="true").returncode == 0
    assert (installer.folder / "installed" / "thing" / "compiled").read_text() == "once"


def test_a_framework_that_is_unknown_is_said_before_anything_is_installed(installer: Installer) -> None:
    result = installer.run("thing", "thong")
    assert result.returncode == 2
    assert "there is no framework 'thong' to install; known are: broken thing" in result.stderr
    assert result.stdout == ""
