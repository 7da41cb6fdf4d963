"""The one interface behind which our engine and every other framework run the same work.

An `Adapter` stands for a framework: what it can do, here and on a cluster. A `Framework` is one way in which it can
train on this machine: `deepspeed/zero-1` is DeepSpeed with the strategy `zero-1`.
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
    def not_finite(self) -> Sequence[NotFinite]:
        """What this rank handed on in the last batch that was not finite."""

    @abstractmethod
    def data_digest(self) -> str:
        """Hash of the data that it trains on."""

    @abstractmethod
    def state_tensors(self) -> Mapping[str, LocalShard]:
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


@dataclass(frozen=True, kw_only=True)
class RankProgram:
    """What runs on every rank."""

    command: Sequence[str]
    mpiexec: str | None = None
    """The launcher of the program's own MPI, where that is another than ours."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What its environment has beyond that of all ranks."""


class Framework(ABC):
    """What can train a `TrainConfig` on this machine."""

    label: ClassVar[str]
    """Name in records and legends."""
    disclosure: ClassVar[str | None] = None
    """What a reader of its figures has to know."""

    @abstractmethod
    def version(self) -> str:
        """Version of the framework, as it states it. Raises `LaunchError` when it is not installed."""

    @abstractmethod
    def unavailable(self, config: TrainConfig) -> str | None:
        """Why this framework cannot run `config` here, or None when it can."""

    @abstractmethod
    def schedule(self, config: TrainConfig) -> ScheduleSpec | None:
        """The pipeline schedule that runs `config`, for its record; None where there is no pipeline."""

    def sub_shards(self, config: TrainConfig) -> int:
        """Into how many sub-shards it cuts a microbatch of `config`, for its record."""
        return 1

    @abstractmethod
    def source_modules(self) -> list[str]:
        """Return the modules whose source the ranks run: a measurement is stale once one of them changes."""

    @abstractmethod
    def program(self, config: TrainConfig, folder: Path) -> AbstractContextManager[RankProgram]:
        """What every rank runs to train in `folder` as its `spec.json` says; leaving the block removes what only the
        ranks needed. The ranks leave the trail of `axonn.training.run_folder`."""


class InProcessFramework(Framework):
    """A framework in this suite's own environment, run by our training loop."""

    @abstractmethod
    def trainer(
        self, config: TrainConfig, runtime: Runtime, spans: SpanRecorder | None
    ) -> AbstractContextManager[Trainer]:
        """Set up, on every rank alike. `torch.distributed` is initialised when there is more than one rank."""

    def source_modules(self) -> list[str]:
        return ["axonn.training.worker", type(self).__module__]

    @contextmanager
    def program(self, config: TrainConfig, folder: Path) -> Iterator[RankProgram]:
        yield RankProgram(command=[sys.executable, "-m", "axonn.training.worker", str(folder)])


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a framework can do on this machine."""

    version: str | None
    """As it states it; None when it is not there."""
    reason: str | None = None
    """Why it is not there, and what to do."""
    strategies: Mapping[str, str]
    """What each strategy that runs here is, in a few words, by the name that comes after the slash."""
    devices: Sequence[str] = ("cpu",)
    precisions: Sequence[FloatType] = ("float32",)
    disclosure: str | None = None
    """What a reader of its figures has to know."""

    @property
    def available(self) -> bool:
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
    """What the ranks are to compute on."""

    @property
    def gpt(self) -> GPTConfig:
        """The model. Raises `LaunchError` where it is no GPT, which is all that other frameworks train."""
        if not isinstance(self.model, GPTConfig):
            raise LaunchError(f"{self.name}: the baselines train GPTs, and {self.model.name} is none; take ours for it")
        return self.model


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a framework is started on a cluster, without the scheduler's own part."""

    command: Sequence[str]
    """What every rank runs, where RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Contents of the files that it reads, by name; they lie where it is started."""
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str | None = None
    """Signal at which the ranks save what they have and end, where they do not look for a file `stop` instead."""
    needs_data: bool = False
    """Whether it has no synthetic data to do with."""
    mpi_on_device: bool = False
    """Whether MPI is given buffers that lie on GPUs."""
    notes: Sequence[str] = ()
    """What differs from the work that was asked for, or must be provided."""


@dataclass(frozen=True, kw_only=True)
class PrintedRun:
    """What the output of a run says."""

    seconds: Sequence[float] = ()
    """Of each reported iteration."""
    starts: Sequence[int] = ()
    """Places in `seconds` of the first iteration of each start, where the run says it: they warm up as the first."""
    losses: Sequence[float] = ()
    memory_bytes: int | None = None
    """Peak over the ranks that said it."""
    parameters: int | None = None
    finished: bool = False
    """Whether it came to its own end."""
    failure: Failure | None = None


class Adapter(ABC):
    """One framework."""

    name: ClassVar[str]
    """That of its entry point."""
    label: ClassVar[str]

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it can do here. Never raises: what keeps it from running is said in it."""

    @abstractmethod
    def framework(self, strategy: str | None) -> Framework:
        """One way to train here. Raises `LaunchError` for a strategy that is not among its capabilities."""

    @abstractmethod
    def launch(self, work: ClusterWork) -> Launch:
        """How to run `work` on a cluster. Raises `LaunchError` when the framework cannot do it, and says why."""

    @abstractmethod
    def read(self, lines: Iterable[str]) -> PrintedRun:
        """What the output of a run that was launched so says: of all ranks, perhaps interleaved or cut short."""

    def pick(self, strategy: str | None, strategies: Mapping[str, type[Framework]]) -> Framework:
        """The framework of that strategy. Raises `LaunchError` with those that there are."""
        if strategy is not None and strategy in strategies:
            return strategies[strategy]()
        asked = f"no strategy '{strategy}'" if strategy is not None else "several strategies"
        known = ", ".join(f"{self.name}/{name}" for name in strategies)
        raise LaunchError(f"{self.label} has {asked}; known are {known}")


def adapter_names() -> list[str]:
    """Names of all adapters."""
    return sorted({entry.name for entry in entry_points(group="axonn.frameworks")})


def load_adapter(name: str) -> Adapter:
    """The framework's adapter. Raises `LaunchError` for an unknown name."""
    for entry in entry_points(group="axonn.frameworks"):
        if entry.name == name:
            made: Adapter = entry.load()()
            return made
    near = get_close_matches(name, adapter_names(), n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise LaunchError(f"unknown framework '{name}'; {hint}known are {', '.join(adapter_names())}")


def load_framework(name: str) -> Framework:
    """A framework by `adapter/strategy`, or `adapter` where it has but one. Raises `LaunchError` for an unknown one."""
    adapter, _, strategy = name.partition("/")
    return load_adapter(adapter).framework(strategy or None)


def version_of(framework: Framework) -> str:
    """Its version, or that it is not installed."""
    try:
        return framework.version()
    except LaunchError:
        return "not installed"


def ran_by(framework: Framework, config: TrainConfig) -> Execution:
    """What `framework` makes of `config`, for a record."""
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
    """The settings of `config` for a record, what the framework chooses being as it `ran`."""
    settings = {name: value for name, value in settings_of(config).items() if not name.startswith("schedule.")}
    chosen = {} if ran.schedule is None else {"schedule": asdict(ran.schedule)}
    return settings | dict(dotted(chosen)) | {"overdecomposition": ran.overdecomposition}
