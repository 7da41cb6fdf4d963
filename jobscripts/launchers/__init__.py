"""Launchers, which start the ranks of a job: one file each, found by `load_launcher`."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from axonn.errors import ConfigError
from jobscripts.schedulers import Resources


class Launcher(ABC):
    """A program that starts the ranks of a job."""

    name: ClassVar[str]
    variables: ClassVar[dict[str, str]]
    """Shell expressions with which a rank finds RANK, WORLD_SIZE and LOCAL_RANK in the launcher's environment."""

    launch_node: ClassVar[bool] = False
    """True if the script runs on a node of its own, the first of the job, where there are no ranks."""

    @abstractmethod
    def command(self, resources: Resources, options: list[str]) -> list[str]:
        """Return the words before the command of the ranks."""

    def forwarded(self, variables: Sequence[str]) -> list[str]:
        """Return the options that pass these variables of the job to ranks on other nodes; none where all reach them
        anyway."""
        return []


def launcher_names() -> list[str]:
    """Return the names of all launchers."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_launcher(name: str) -> Launcher:
    """Load a launcher by name. Raises `ConfigError` listing the known ones."""
    if name not in launcher_names():
        raise ConfigError(f"there is no launcher '{name}'; known are {', '.join(launcher_names())}")
    launcher: Launcher = importlib.import_module(f"{__name__}.{name}").LAUNCHER()
    return launcher
