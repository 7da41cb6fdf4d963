"""The interface behind which the suite's engine and every other framework run the same work.

An `Adapter` stands for a framework and its capabilities, on this machine and on a cluster. A `Framework` is one way in
which it can train on this machine: `deepspeed/zero-1` is DeepSpeed with the strategy `zero-1`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol

from axonn.checkpoint.local_shard import LocalShard
from axonn.config.loading import dotted
from axonn.config.model_config import ModelConfig
from axonn.config.train_config import FloatType, TrainConfig
from axonn.device.devices import DeviceType
from axonn.distributed.runtime import Runtime
from axonn.engine import BatchResult
from axonn.errors import LaunchError
from axonn.inter_layer.non_finite import NotFinite
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.observability.records import Execution, Failure, settings_of
from axonn.observability.traffic import Traffic
from axonn.perf.strategy import Strategy
from axonn.schedules import ScheduleSpec
from axonn.spans import SpanRecorder


class Trainer(Protocol):
    """A framework set up for one configuration, on one rank."""

    def train_batch(self, step: int) -> float:
        """Train on batch number `step` of the data; return the mean loss of the whole batch, on every rank."""
        ...


class ResumableTrainer(ABC):
    """A trainer that also evaluates, reports more about a batch than its loss, and resumes from a saved state."""

    result: BatchResult
    """Result of the last batch."""

    @abstractmethod
    def train_batch(self, step: int) -> float:
        """Train on batch number `step`, as every `Trainer` does."""

    @abstractmethod
    def evaluate(self, number: int) -> float:
        """Return the mean loss of held-out batch `number`, on every rank, without changing any state."""

    @abstractmethod
    def not_finite(self) -> Sequence[NotFinite]:
        """Return the non-finite values that this rank passed on in the last batch."""

    @abstractmethod
    def data_digest(self) -> str:
        """Return a hash of the training data."""

    @abstractmethod
    def state_tensors(self) -> Mapping[str, LocalShard]:
        """Return this rank's shards of the state, by job-wide names; call `state_loaded` after writing into them."""

    @abstractmethod
    def state_loaded(self) -> None:
        """Go on from what was written into `state_tensors`."""

    @abstractmethod
    def progress(self) -> Mapping[str, Any]:
        """Return the rest of the state: plain JSON, the same on every rank."""

    @abstractmethod
    def load_progress(self, progress: Mapping[str, Any]) -> None:
        """Restore what `progress` returned."""

    @abstractmethod
    def memory(self) -> Mapping[str, int]:
        """Return the bytes of memory by category."""

    def traffic(self) -> Sequence[Traffic]:
        """Return what this rank sent for the last batch, where that is counted."""
        return ()


@dataclass(frozen=True, kw_only=True)
class RankProgram:
    """The program that runs on every rank."""

    command: Sequence[str]
    mpiexec: str | None = None
    """The launcher of the program's own MPI, where that differs from the suite's."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables beyond those of all ranks."""


class Framework(ABC):
    """One way to train a `TrainConfig` on this machine."""

    label: ClassVar[str]
    """Name in records and legends."""
    disclosure: ClassVar[str | None] = None
    """Remark that a reader of its figures needs."""

    @abstractmethod
    def version(self) -> str:
        """Return the version that the framework states. Raises `LaunchError` when it is not installed."""

    @abstractmethod
    def unavailable(self, config: TrainConfig) -> str | None:
        """Return why this framework cannot run `config` on this machine; None when it can."""

    @abstractmethod
    def schedule(self, config: TrainConfig) -> ScheduleSpec | None:
        """Return the pipeline schedule that runs `config`, for its record; None where there is no pipeline."""

    def sub_shards(self, config: TrainConfig) -> int:
        """Return the number of sub-shards into which a microbatch of `config` is cut, for its record."""
        return 1

    @abstractmethod
    def source_modules(self) -> list[str]:
        """Return the modules whose source the ranks run: a measurement is stale once one of them changes."""

    @abstractmethod
    def program(self, config: TrainConfig, folder: Path) -> AbstractContextManager[RankProgram]:
        """Yield the program of every rank that trains in `folder` as its `spec.json` says; leaving the block removes
        files that only the ranks needed. The ranks write the files of `axonn.training.run_folder`."""


class InProcessFramework(Framework):
    """A framework that lives in the suite's own environment and is run by its training loop."""

    @abstractmethod
    def trainer(
        self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None
    ) -> AbstractContextManager[Trainer]:
        """Set up the trainer, on every rank alike. `torch.distributed` is initialised if there are several ranks."""

    def source_modules(self) -> list[str]:
        return ["axonn.training.worker", type(self).__module__]

    @contextmanager
    def program(self, config: TrainConfig, folder: Path) -> Iterator[RankProgram]:
        yield RankProgram(command=[sys.executable, "-m", "axonn.training.worker", str(folder)])


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Capabilities of a framework on this machine."""

    version: str | None
    """The version that it states; None when it is not installed."""
    reason: str | None = None
    """Why it is not installed, and what to do."""
    strategies: Mapping[str, str]
    """A few words about each strategy that runs on this machine, by the name after the slash."""
    devices: Sequence[str] = ("cpu",)
    precisions: Sequence[FloatType] = ("float32",)
    disclosure: str | None = None
    """Remark that a reader of its figures needs."""

    @property
    def available(self) -> bool:
        """True where the framework is installed."""
        return self.version is not None


@dataclass(frozen=True, kw_only=True)
class ClusterWork:
    """A configuration at a cluster's scale."""

    name: str
    model: ModelConfig
    strategy: Strategy
    batch_size: int
    steps: int
    gpus: int
    gpus_per_node: int
    gradient_clipping: float | None = None
    data: str | None = None
    """Prefix of the tokenised data; None for synthetic tokens."""
    device: DeviceType = "cuda"
    """Device that the ranks compute on."""

    @property
    def gpt(self) -> GPTConfig:
        """The model. Raises `LaunchError` where it is not a GPT, the only architecture that other frameworks train."""
        if not isinstance(self.model, GPTConfig):
            raise LaunchError(f"{self.name}: the baselines train GPTs, and {self.model.name} is none; take ours for it")
        return self.model


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Start of a framework on a cluster, without the scheduler's own part."""

    command: Sequence[str]
    """Command of every rank, where RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Contents of the files that it reads, by name; they lie in the folder where it is started."""
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str | None = None
    """Signal at which the ranks save and end; None where they look for a file `stop` instead."""
    needs_data: bool = False
    """True where it cannot train on synthetic data."""
    mpi_on_device: bool = False
    """True where MPI is given buffers that lie on GPUs."""
    notes: Sequence[str] = ()
    """Differences from the requested work, and requirements of the launch."""


@dataclass(frozen=True, kw_only=True)
class PrintedRun:
    """Results read from the output of a run."""

    seconds: Sequence[float] = ()
    """Seconds of each reported iteration."""
    starts: Sequence[int] = ()
    """Indices in `seconds` of the first iteration of each start, where the run reports it: each warms up anew."""
    losses: Sequence[float] = ()
    memory_bytes: int | None = None
    """Peak over the ranks that reported it."""
    parameters: int | None = None
    finished: bool = False
    """True where the run came to its own end."""
    failure: Failure | None = None


class Adapter(ABC):
    """A framework, with all of its strategies."""

    name: ClassVar[str]
    """Name of its entry point."""
    label: ClassVar[str]

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Return its capabilities on this machine. Never raises: `Capabilities.reason` says what is missing."""

    @abstractmethod
    def framework(self, strategy: str | None) -> Framework:
        """Return one way to train on this machine. Raises `LaunchError` for a strategy outside of its capabilities."""

    @abstractmethod
    def launch(self, work: ClusterWork) -> Launch:
        """Return the launch of `work` on a cluster. Raises `LaunchError`, with the reason, when it cannot do that."""

    @abstractmethod
    def read(self, lines: Iterable[str]) -> PrintedRun:
        """Parse the output of a run that `launch` started: of all ranks, perhaps interleaved or cut short."""

    def pick(self, strategy: str | None, strategies: Mapping[str, type[Framework]]) -> Framework:
        """Return the framework of a strategy. Raises `LaunchError` naming the known ones."""
        if strategy is not None and strategy in strategies:
            return strategies[strategy]()
        asked = f"no strategy '{strategy}'" if strategy is not None else "several strategies"
        known = ", ".join(f"{self.name}/{name}" for name in strategies)
        raise LaunchError(f"{self.label} has {asked}; known are {known}")


def adapter_names() -> list[str]:
    """Return the names of all adapters."""
    return sorted({entry.name for entry in entry_points(group="axonn.frameworks")})


def load_adapter(name: str) -> Adapter:
    """Return the adapter of a framework. Raises `LaunchError` for an unknown name."""
    for entry in entry_points(group="axonn.frameworks"):
        if entry.name == name:
            adapter: Adapter = entry.load()()
            return adapter
    near = get_close_matches(name, adapter_names(), n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise LaunchError(f"unknown framework '{name}'; {hint}known are {', '.join(adapter_names())}")


def load_framework(name: str) -> Framework:
    """Return a framework by `adapter/strategy`, or by `adapter` if it has only one. Raises `LaunchError` if unknown."""
    adapter, _, strategy = name.partition("/")
    return load_adapter(adapter).framework(strategy or None)


def version_of(framework: Framework) -> str:
    """Return the framework's version, or "not installed"."""
    try:
        return framework.version()
    except LaunchError:
        return "not installed"


def ran_by(framework: Framework, config: TrainConfig) -> Execution:
    """Return how `framework` executes `config`, for a record."""
    return Execution(
        framework=framework.label,
        version=version_of(framework),
        grid=config.grid,
        microbatch_size=config.microbatch_size,
        schedule=framework.schedule(config),
        microbatches=config.batch_size // (config.microbatch_size * config.grid.data),
        overdecomposition=framework.sub_shards(config),
    )


def settings_ran(config: TrainConfig, ran: Execution) -> dict[str, Any]:
    """Return the settings of `config` for a record, with those that the framework chose taken from `ran`."""
    settings = {name: value for name, value in settings_of(config).items() if not name.startswith("schedule.")}
    chosen = {} if ran.schedule is None else {"schedule": asdict(ran.schedule)}
    return settings | dict(dotted(chosen)) | {"overdecomposition": ran.overdecomposition}
