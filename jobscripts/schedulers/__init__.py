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
    """What a batch system says of a job, times as it prints them."""

    state: State
    reason: str | None = None
    """Why it waits, or was ended."""
    since: str | None = None
    """When it was handed in, started or ended."""
    left: str | None = None
    """Until its wall limit."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks for."""

    name: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cores_per_rank: int
    seconds: int
    """Wall limit."""
    warn_seconds: int
    """So long before it the script is told."""
    account: str | None
    queue: str | None
    """Of LSF; a partition of Slurm."""
    qos: str | None = None
    """Quality of service (Slurm)."""
    constraint: str | None
    options: Sequence[str]

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def node_hours(self) -> float:
        """At most."""
        return self.nodes * self.seconds / 3600


class Scheduler(ABC):
    """A batch system."""

    name: ClassVar[str]
    variables: ClassVar[dict[str, str]]
    """Shell in a running job: id, nodes (a command that prints the name of each node once), submitted_from."""
    unknown_job: ClassVar[str] = ""
    """What is printed when a job that is asked for is long gone: that, too, is an answer."""
    reads_script: ClassVar[bool] = False
    """Whether `submit` takes the script from its standard input."""
    runs_at_once: ClassVar[bool] = False
    """Whether `submit` is the run itself, which ends when the job does."""

    @abstractmethod
    def directives(self, resources: Resources) -> list[str]:
        """Lines at the head of the script."""

    @abstractmethod
    def submit(self, script: str) -> list[str]:
        """Command that hands in a script, run in its folder."""

    @abstractmethod
    def job_id(self, printed: str) -> str:
        """That of the job, from what `submit` printed. Raises `LaunchError` where there is none."""

    @abstractmethod
    def ask(self, ids: Sequence[str]) -> list[list[str]]:
        """Commands that print the states of jobs; the next is asked for what those before it do not know.

        The first knows every job that waits or runs.
        """

    @abstractmethod
    def states(self, printed: str) -> dict[str, Status]:
        """By id, from what one of `ask` printed."""


def scheduler_names() -> list[str]:
    """All that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_scheduler(name: str) -> Scheduler:
    """By name. Raises `ConfigError` with those that there are."""
    if name not in scheduler_names():
        raise ConfigError(f"there is no scheduler '{name}'; known are {', '.join(scheduler_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    made: Scheduler = module.SCHEDULER()
    return made
