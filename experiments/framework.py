"""The one interface behind which our engine and every other framework run the same work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from typing import Any, Protocol

from axonn.config import ScheduleConfig, TrainConfig
from axonn.engine import BatchResult
from axonn.errors import LaunchError
from axonn.parts import Part
from axonn.runtime import Runtime
from axonn.trace import SpanRecorder
from axonn.traffic import Traffic


class Trainer(Protocol):
    """A framework set up for one configuration, on one rank."""

    def train_batch(self, step: int) -> float:
        """Train on batch number `step` of the configured data; the mean loss of the whole batch, on every rank."""
        ...


class ResumableTrainer(ABC):
    """A trainer that also evaluates, tells more of a batch than its loss, and goes on from a saved state."""

    result: BatchResult
    """What came of the last batch."""

    @abstractmethod
    def train_batch(self, step: int) -> float:
        """As of every `Trainer`."""

    @abstractmethod
    def evaluate(self, number: int) -> float:
        """Mean loss of held-out batch `number`, on every rank, without changing anything."""

    @abstractmethod
    def data_digest(self) -> str:
        """Hash of the data that it trains on."""

    @abstractmethod
    def state_tensors(self) -> Mapping[str, Part]:
        """This rank's part of the state, by names that are global over the job; call `state_loaded` after writing."""

    @abstractmethod
    def state_loaded(self) -> None:
        """Go on from what was written into `state_tensors`."""

    @abstractmethod
    def progress(self) -> Mapping[str, Any]:
        """The rest of the state, plain JSON, the same on every rank."""

    @abstractmethod
    def load_progress(self, progress: Mapping[str, Any]) -> None:
        """Inverse of `progress`."""

    @abstractmethod
    def memory(self) -> Mapping[str, int]:
        """Bytes by category."""

    def traffic(self) -> Sequence[Traffic]:
        """What this rank sent for the last batch, where that is counted."""
        return ()


class Framework(Protocol):
    """What can train a `TrainConfig`."""

    label: str
    """Name in records and legends."""

    def version(self) -> str:
        """Version of the framework, as it states it."""
        ...

    def unavailable(self, config: TrainConfig) -> str | None:
        """Why this framework cannot run `config` here, or None when it can."""
        ...

    def schedule(self, config: TrainConfig) -> ScheduleConfig | None:
        """The pipeline schedule that runs `config`, for its record; None where there is no pipeline."""
        ...

    def trainer(
        self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None
    ) -> AbstractContextManager[Trainer]:
        """Set up, on every rank alike. `torch.distributed` is initialised when there is more than one rank."""
        ...


def framework_names() -> list[str]:
    """Names of all installed frameworks' adapters."""
    return sorted(entry.name for entry in entry_points(group="axonn.frameworks"))


def load_framework(name: str) -> Framework:
    """The framework's adapter. Raises `LaunchError` for an unknown name."""
    for entry in entry_points(group="axonn.frameworks"):
        if entry.name == name:
            made: Framework = entry.load()()
            return made
    raise LaunchError(f"unknown framework '{name}'; known are {', '.join(framework_names())}")
