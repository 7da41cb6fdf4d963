"""Records: one per run, published, predicted or measured, in one versioned schema, validated on read and on write."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from axonn.config.loading import Line, Loss, dotted, load_json, shortened
from axonn.config.model_config import ModelConfig
from axonn.config.train_config import StrictModel
from axonn.durable_files import read_json, reason_of, replace_durably
from axonn.errors import RecordError
from axonn.grid import ProcessGrid
from axonn.observability.machine_usage import BatchUsage, busy_share, is_busy
from axonn.schedules import ScheduleSpec

SCHEMA = "axonn-records/1"
RecordKind = Literal["published", "predicted", "measured"]


class Workload(StrictModel):
    """The work that was asked for: model, batch and devices."""

    model: Line
    parameters: int
    gpus: int
    """Number of devices (GPUs, or ranks on a machine without GPUs)."""
    batch_size: int
    precision: str
    seq_len: int | None = None
    """Size of a GPT, as are the next three."""
    layers: int | None = None
    hidden: int | None = None
    vocab: int | None = None
    forward_flops: int | None = None
    """FLOPs of the forward of one sample, for any other model."""

    @classmethod
    def of(cls, model: ModelConfig, *, gpus: int, batch_size: int, precision: str) -> Workload:
        """Return the workload of training `model` on batches of `batch_size` sequences or images."""
        return cls(
            model=model.name,
            parameters=model.parameters,
            gpus=gpus,
            batch_size=batch_size,
            precision=precision,
            **model.workload(),
        )

    def model_post_init(self, context: object) -> None:
        gpt = [value is not None for value in (self.seq_len, self.layers, self.hidden, self.vocab)]
        if any(gpt) != all(gpt) or all(gpt) == (self.forward_flops is not None):
            raise ValueError("work has either seq_len, layers, hidden and vocab, or forward_flops")

    def flops(self, *, recompute: bool) -> float:
        """Return the floating-point operations of one batch.

        For a GPT by `gpt_flops`, for other models 3 forwards (a backward counts as two), or 4 with recomputation.
        """
        if self.seq_len is None or self.layers is None or self.hidden is None or self.vocab is None:
            return (4.0 if recompute else 3.0) * self.batch_size * (self.forward_flops or 0)
        return gpt_flops(
            batch=self.batch_size,
            seq_len=self.seq_len,
            layers=self.layers,
            hidden=self.hidden,
            vocab=self.vocab,
            recompute=recompute,
        )


class Execution(StrictModel):
    """The execution: framework and parallel strategy."""

    framework: Line
    version: str
    grid: ProcessGrid
    microbatch_size: int | None = None
    """None if the publication does not state it."""
    overdecomposition: int | None = None
    """Sub-shards per microbatch; None if unknown."""
    schedule: ScheduleSpec | None = None
    microbatches: int | None = None
    """Number per pipeline."""


class Machine(StrictModel):
    """The machine that it ran on, or that a prediction is for."""

    name: Line
    host: str | None = None
    cpu: str | None = None
    cores: int | None = None
    device: str | None = None
    """Device of the ranks: "cpu", or the name of the GPU. This and the next three are as the driver reports them."""
    driver: str | None = None
    cuda: str | None = None
    """CUDA version that PyTorch was built with."""
    clocks: dict[str, float] | None = None
    """Clocks and power limit of the GPU: sm_mhz, sm_max_mhz and power_limit_w."""
    python: str | None = None
    torch: str | None = None
    mpi: str | None = None
    commit: str | None = None
    threads_per_rank: int | None = None


class Failure(StrictModel):
    """The reason why there is no result. `rank` is None when the failure is not that of a single rank."""

    cause: Literal[
        "out-of-memory", "timeout", "nan", "dead-rank", "error", "interrupted", "not-comparable", "unavailable"
    ]
    """not-comparable: the losses differ from those of the same work elsewhere; unavailable: not run, because the
    framework is not installed or does not support this."""
    detail: str
    rank: int | None = None


class Record(StrictModel):
    """One run. It has either `batch_time_s` or `failure`; a published one may have `phases_s` instead."""

    kind: RecordKind
    experiment: Line
    point: Line
    """Name of the point in the experiment, shared by its published, predicted and measured records."""
    asked: Workload
    ran: Execution
    settings: dict[str, Any] = {}
    """All settings of the run or prediction by dotted name: those of a `TrainConfig`, or those of the model (prefixed
    with `model.`) and of a `Strategy`. Empty for published runs, whose settings are not all known."""
    machine: Machine
    source: str
    """Publication, or the command that measured or predicted it."""
    batch_time_s: float | None = Field(default=None, gt=0)
    batch_times_s: list[Annotated[float, Field(ge=0)]] = []
    """Time of every batch, including warm-up."""
    warmup_batches: int | None = None
    """Number of leading batches that `batch_time_s`, the mean over the rest, leaves out."""
    losses: list[Loss] = []
    """Loss of every batch."""
    parts_s: dict[str, float] = {}
    """Seconds of a batch by part (`axonn.spans.TimeBreakdown`), if spans were recorded."""
    phases_s: dict[str, float] = {}
    """Seconds of inter_layer (from the first forward to the last backward), all_reduce and optimizer, on the stage that
    ends last, where they follow each other (`axonn.observability.phases.Phases`). A published record may have all or
    some of these and no batch time."""
    overlap_s: dict[str, float] = {}
    """Overlap of the tensor axes' collectives with compute (`axonn.spans.Overlap`), if spans were recorded."""
    memory_bytes: int | None = None
    """Peak over ranks: device memory, or on a CPU the resident memory of the process."""
    memory_parts: dict[str, int] = {}
    """Bytes by part, each of the rank that has most of it. For a prediction: model_state, checkpoints and working
    (`axonn.perf.timing.memory_model.Memory`); for our engine: parameters, gradients, optimizer_state, buckets and
    activations on the device, and host (`Engine.memory`)."""
    memory_of_all: dict[str, int] = {}
    """The same parts, summed over all ranks."""
    bytes_per_batch: dict[str, int] = {}
    """Bytes that a rank sends per batch, by axis of the grid, for the rank that sends most along it; all-reduces and
    all-gathers count as over rings (`axonn.observability.traffic.Traffic`). Measured on the last batch, if counted."""
    usage: list[BatchUsage] = []
    """Processor usage in the batches of `batch_times_s`, up to the first that a rank did not log. Empty, as in records
    that predate this field: unknown, and so is whether the machine was busy."""
    tflops_per_gpu: float | None = None
    tflops_formula: str | None = None
    tflops_per_gpu_without_recompute: float | None = None
    pct_peak: float | None = None
    configuration: str | None = None
    """Hash of the configuration, if it was run by `axonn train`."""
    fingerprint: str | None = None
    """Hash of everything that the result depends on; a point is measured again when it changes."""
    created: str | None = None
    run_folder: Line | None = None
    failure: Failure | None = None
    note: str | None = None

    def model_post_init(self, context: object) -> None:
        in_phases = self.kind == "published" and bool(self.phases_s)
        if (self.batch_time_s is None) == (self.failure is None) and not (in_phases and self.failure is None):
            raise ValueError("a record has either a batch_time_s or a failure")

    @property
    def counted_usage(self) -> list[BatchUsage]:
        """Usage of the batches after warm-up."""
        return self.usage[self.warmup_batches or 0 :]

    @property
    def busy(self) -> bool | None:
        """True if the machine was busy with other work during the measurement; None if unknown.

        See `axonn.observability.machine_usage`.
        """
        return is_busy(self.counted_usage)

    @property
    def busy_share(self) -> float | None:
        """Share of the core seconds of these batches that went to others."""
        return busy_share(self.counted_usage)


class _File(StrictModel):
    schema_: Literal["axonn-records/1"] = Field(alias="schema")
    records: list[Record]


def gpt_flops(*, batch: int, seq_len: int, layers: int, hidden: int, vocab: int, recompute: bool = True) -> float:
    """Return the floating-point operations of one batch: 96 b s l h^2 (1 + s/6h + V/16lh), with full recomputation.

    Narayanan et al., SC 2021, equation 3; used by IPDPS 2022. Without recomputation the layers count three passes
    instead of four, and the head three as before: 72 b s l h^2 (1 + s/6h) + 6 b s h V.
    """
    passes = 96 if recompute else 72
    return passes * batch * seq_len * layers * hidden**2 * (1 + seq_len / (6 * hidden)) + (
        6 * batch * seq_len * hidden * vocab
    )


def settings_of(run: StrictModel, **others: Any) -> dict[str, Any]:
    """Return the content of `Record.settings`: the fields of the configuration or strategy `run` by dotted name, and
    those of `others`, each under its keyword."""
    plain = {name: v.model_dump(mode="json") if isinstance(v, StrictModel) else v for name, v in others.items()}
    return dict(dotted(run.model_dump(mode="json") | plain))


def write_records(path: Path | str, records: Sequence[Record]) -> None:
    """Write a record file, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"schema": SCHEMA, "records": [r.model_dump(mode="json", exclude_none=True) for r in records]}, indent=1
    )
    replace_durably(path, text + "\n")


def read_records(path: Path | str) -> list[Record]:
    """Read a record file. Raises `RecordError` naming file and key when it does not match the schema."""
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: is not a record file: {reason_of(error)}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        shown = shortened(schema, plain=True)
        raise RecordError(f"{path}: has schema '{shown}', expected '{SCHEMA}'; remove it or write it anew")
    return load_json(path, _File, otherwise="remove it or write it anew").records


def read_all(folder: Path | str) -> list[Record]:
    """Read the records of every `*.json` file in a folder, sorted by file name."""
    files: Iterable[Path] = sorted(Path(folder).glob("*.json"))
    return [record for file in files for record in read_records(file)]
