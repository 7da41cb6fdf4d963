"""Batch systems: one file each. `load_scheduler` finds them, so a new one is a file beside these and a template."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from axonn.errors import ConfigError

State = Literal[
    "waiting", "running", "done", "failed", "cancelled", "timed-out", "out-of-memory", "node-failure", "unknown"
]


@dataclass(frozen=True, kw_only=True)
class Status:
    """A batch system's report on a job; times are as it prints them."""

    state: State
    reason: str | None = None
    """Reason for which it waits, or was ended."""
    since: str | None = None
    """Time at which it was submitted, started or ended."""
    left: str | None = None
    """Time until its wall limit."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Request of a job."""

    name: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cores_per_rank: int
    seconds: int
    """Wall limit."""
    warn_seconds: int
    """Seconds before the wall limit at which the script is warned."""
    account: str | None
    queue: str | None
    """Queue of LSF; partition of Slurm."""
    qos: str | None = None
    """Quality of service (Slurm)."""
    constraint: str | None
    options: Sequence[str]

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def node_hours(self) -> float:
        """Most node-hours that the job may take."""
        return self.nodes * self.seconds / 3600


class Scheduler(ABC):
    """A batch system."""

    name: ClassVar[str]
    variables: ClassVar[dict[str, str]]
    """Shell in a running job: id, nodes (a command that prints the name of each node once), submitted_from."""
    unknown_job: ClassVar[str] = ""
    """Message about a job that is long gone: it counts as an answer, too."""
    reads_script: ClassVar[bool] = False
    """True if `submit` takes the script from its standard input."""
    runs_at_once: ClassVar[bool] = False
    """True if `submit` is the run itself, which ends when the job does."""

    @abstractmethod
    def directives(self, resources: Resources) -> list[str]:
        """Return the lines at the head of the script."""

    @abstractmethod
    def submit(self, script: str) -> list[str]:
        """Return the command that submits a script, run in its folder."""

    @abstractmethod
    def job_id(self, printed: str) -> str:
        """Return the id of the job from the output of `submit`. Raises `LaunchError` where there is none."""

    @abstractmethod
    def ask(self, ids: Sequence[str]) -> list[list[str]]:
        """Return commands that print the states of jobs; the next is run for jobs that those before it do not know.

        The first knows every job that waits or runs.
        """

    @abstractmethod
    def states(self, printed: str) -> dict[str, Status]:
        """Return the states by id from the output of one of `ask`."""


def scheduler_names() -> list[str]:
    """Return the names of all schedulers."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_scheduler(name: str) -> Scheduler:
    """Load a scheduler by name. Raises `ConfigError` listing the known ones."""
    if name not in scheduler_names():
        raise ConfigError(f"there is no scheduler '{name}'; known are {', '.join(scheduler_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    scheduler: Scheduler = module.SCHEDULER()
    return scheduler
