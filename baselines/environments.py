"""Virtual environments of other frameworks: each has its own, so that no framework's requirements break another.

`make baselines` installs them under `.baselines/NAME`, with the versions of `baselines/environments/NAME.txt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

from axonn.errors import LaunchError
from axonn.training.places import ROOT
from experiments.missing_frameworks import INSTALL

FOLDER = ROOT / ".baselines"
GPUS = Path("/proc/driver/nvidia/gpus")
"""Folder with an entry for each GPU of this machine."""
LOCKS = ROOT / "baselines" / "environments"
"""Folder of the lock files, one for each environment, one `name==version` a line."""


@dataclass(frozen=True)
class Environment:
    """The place where a framework is installed."""

    name: str
    distribution: str
    """Package that the environment is for."""

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        """Its interpreter, whether or not it exists; by one path only, since a second path would compile everything
        anew."""
        return self.folder.resolve() / "bin" / "python"

    @property
    def log(self) -> Path:
        """File with what was printed when the framework could not be installed."""
        return FOLDER / f"{self.name}.log"

    @property
    def mpiexec(self) -> str | None:
        """Launcher of its own MPI, where it has one."""
        path = self.folder / "bin" / "mpiexec"
        return str(path) if path.exists() else None

    @property
    def missing(self) -> str | None:
        """Reason for which the framework is not available, and what to do; None where it is."""
        if not self.python.exists() or self.installed(self.distribution) is None:
            where, how = self.folder.relative_to(FOLDER.parent), f"{INSTALL}{self.name}"
            if self.log.exists():
                log = self.log.relative_to(FOLDER.parent)
                return f"{self.distribution} could not be installed in {where}; {log} says why; then {how}"
            return f"{self.distribution} is not installed; {how} installs it ({where})"
        return None

    def installed(self, distribution: str) -> str | None:
        """Return the version of a package in it, or None where it is not installed."""
        places = [str(path) for path in self.folder.glob("lib*/python*/site-packages")]
        package = next(iter(Distribution.discover(name=distribution, path=places)), None)
        return None if package is None else package.version

    @property
    def devices(self) -> Sequence[str]:
        """Devices that its torch computes on here, found without importing it, which takes seconds."""
        on_gpu = GPUS.is_dir() and not (self.installed("torch") or "+cpu").endswith("+cpu")
        return ("cpu", "cuda") if on_gpu else ("cpu",)

    def version(self) -> str:
        """Return the installed versions as text. Raises `LaunchError` when the framework is not installed."""
        if (reason := self.missing) is not None:
            raise LaunchError(reason)
        return ", ".join(f"{name} {self.installed(name)}" for name in (self.distribution, "torch"))
