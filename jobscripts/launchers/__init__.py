"""What starts the ranks of a job: one file each, found by `load_launcher`."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from axonn.errors import ConfigError
from jobscripts.schedulers import Resources


class Launcher(ABC):
    """A launcher."""

    name: ClassVar[str]
    variables: ClassVar[dict[str, str]]
    """Shell expressions with which a rank finds RANK, WORLD_SIZE and LOCAL_RANK in the launcher's environment."""

    launch_node: ClassVar[bool] = False
    """Whether the script runs on a node of its own, the first of the job, where no ranks are."""

    @abstractmethod
    def command(self, resources: Resources, options: list[str]) -> list[str]:
        """Words before the command of the ranks."""

    def forwarded(self, variables: Sequence[str]) -> list[str]:
        """Options with which these variables of the job reach ranks on other nodes; none where all do by themselves."""
        return []


def launcher_names() -> list[str]:
    """All that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_launcher(name: str) -> Launcher:
    """By name. Raises `ConfigError` with those that there are."""
    if name not in launcher_names():
        raise ConfigError(f"there is no launcher '{name}'; known are {', '.join(launcher_names())}")
    made: Launcher = importlib.import_module(f"{__name__}.{name}").LAUNCHER()
    return made
