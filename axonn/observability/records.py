"""Records: one per run, published, predicted or measured, all in one versioned schema, checked on read and on write."""

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
    """The work: what was to be computed."""

    model: Line
    parameters: int
    gpus: int
    """Devices (GPUs, or ranks on a machine without)."""
    batch_size: int
    precision: str
    seq_len: int | None = None
    """This and the next three: of a GPT."""
    layers: int | None = None
    hidden: int | None = None
    vocab: int | None = None
    forward_flops: int | None = None
    """Of one sample, of a model that is none."""

    @classmethod
    def of(cls, model: ModelConfig, *, gpus: int, batch_size: int, precision: str) -> Workload:
        """Training `model` on batches of `batch_size` sequences or images."""
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
        """Floating-point operations of one batch: by `gpt_flops`, or else 3 forwards (a backward is two), 4 with
        recompute."""
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
    """The strategy: how it was computed."""

    framework: Line
    version: str
    grid: ProcessGrid
    microbatch_size: int | None = None
    """None where a publication does not say."""
    overdecomposition: int | None = None
    """Sub-shards of a microbatch; None where it is not known."""
    schedule: ScheduleSpec | None = None
    microbatches: int | None = None
    """Per pipeline."""


class Machine(StrictModel):
    """Where it ran (or, for a prediction, was meant to run)."""

    name: Line
    host: str | None = None
    cpu: str | None = None
    cores: int | None = None
    device: str | None = None
    """What the ranks computed on: "cpu", or the name of the GPU. This and the next three are as the driver says."""
    driver: str | None = None
    cuda: str | None = None
    """Version of CUDA that PyTorch was built with."""
    clocks: dict[str, float] | None = None
    """Of the GPU: sm_mhz and sm_max_mhz, and power_limit_w."""
    python: str | None = None
    torch: str | None = None
    mpi: str | None = None
    commit: str | None = None
    threads_per_rank: int | None = None


class Failure(StrictModel):
    """Why there is no result. `rank` is None when the cause is not one rank's."""

    cause: Literal[
        "out-of-memory", "timeout", "nan", "dead-rank", "error", "interrupted", "not-comparable", "unavailable"
    ]
    """The last two: other losses than those of the same work elsewhere; not run, since the framework is not installed
    or cannot do this."""
    detail: str
    rank: int | None = None


class Record(StrictModel):
    """One run. Either `batch_time_s` or `failure` is given, or `phases_s` of a published one."""

    kind: RecordKind
    experiment: Line
    point: Line
    """Name of the point in the experiment, the same for its published, predicted and measured record."""
    asked: Workload
    ran: Execution
    settings: dict[str, Any] = {}
    """Every setting with which it ran, or was predicted, by its dotted name: those of a `TrainConfig`, or of the model
    (`model.` before them) and of a `Strategy`. Empty of published runs, whose settings are not all known."""
    machine: Machine
    source: str
    """Publication, or the command that measured or computed it."""
    batch_time_s: float | None = Field(default=None, gt=0)
    batch_times_s: list[Annotated[float, Field(ge=0)]] = []
    """Every batch, the warm-up ones included."""
    warmup_batches: int | None = None
    """Leading batches that `batch_time_s`, a mean over the others, leaves out."""
    losses: list[Loss] = []
    """Of every batch."""
    parts_s: dict[str, float] = {}
    """Seconds of a batch by part (`axonn.spans.Parts`), where spans were taken."""
    phases_s: dict[str, float] = {}
    """Seconds of inter_layer (from the first forward to the last backward), all_reduce and optimizer, on the stage that
    ends last, where they follow each other (`axonn.observability.phases.Phases`). A published record may have these, or some of them,
    and no batch time."""
    overlap_s: dict[str, float] = {}
    """How much of the tensor axes' collectives ran under compute (`axonn.spans.Overlap`), where spans were taken."""
    memory_bytes: int | None = None
    """Peak over ranks: device memory, or resident memory of the process on a CPU."""
    memory_parts: dict[str, int] = {}
    """Bytes by part, each of the rank that has most of it. Of a prediction model_state, checkpoints and working
    (`axonn.perf.timing.memory_model.Memory`); of our engine parameters, gradients, optimizer_state, buckets and activations on the
    device, and host (`Engine.memory`)."""
    memory_of_all: dict[str, int] = {}
    """The same parts, summed over all ranks."""
    bytes_per_batch: dict[str, int] = {}
    """Bytes that a rank sends for a batch, by axis of the grid, from the rank that sends most along it; all-reduces and
    gathers as over rings (`axonn.observability.traffic.Traffic`). Of the last batch, where it was counted."""
    usage: list[BatchUsage] = []
    """What the processors did in the batches of `batch_times_s`, as far as all ranks said it; empty where they did not,
    as in records of before there was this field: nobody knows then whether the machine was busy."""
    tflops_per_gpu: float | None = None
    tflops_formula: str | None = None
    tflops_per_gpu_without_recompute: float | None = None
    pct_peak: float | None = None
    configuration: str | None = None
    """Hash of the configuration that was run, where it was one of `axonn train`."""
    fingerprint: str | None = None
    """Hash of everything that the result depends on; a point is measured anew when it changes."""
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
        """Of the batches after the warm-up ones."""
        return self.usage[self.warmup_batches or 0 :]

    @property
    def busy(self) -> bool | None:
        """Whether the machine was busy with other work while this was measured (`axonn.observability.machine_usage`); None where nobody
        knows."""
        return is_busy(self.counted_usage)

    @property
    def busy_share(self) -> float | None:
        """Share of the core seconds of these batches that went to others."""
        return busy_share(self.counted_usage)


class _File(StrictModel):
    schema_: Literal["axonn-records/1"] = Field(alias="schema")
    records: list[Record]


def gpt_flops(*, batch: int, seq_len: int, layers: int, hidden: int, vocab: int, recompute: bool = True) -> float:
    """Floating-point operations of one batch: 96 b s l h^2 (1 + s/6h + V/16lh), with full activation recompute.

    Narayanan et al., SC 2021, equation 3; used by IPDPS 2022. Without recompute three passes instead of four count, and
    the head's three passes stay: 72 b s l h^2 (1 + s/6h) + 6 b s h V.
    """
    passes = 96 if recompute else 72
    return passes * batch * seq_len * layers * hidden**2 * (1 + seq_len / (6 * hidden)) + (
        6 * batch * seq_len * hidden * vocab
    )


def settings_of(run: StrictModel, **others: Any) -> dict[str, Any]:
    """What `Record.settings` says of a run: the fields of its configuration or strategy by their dotted names, and
    `others` by theirs."""
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
    """Read a record file. Raises `RecordError` naming file and key when its schema is not ours."""
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: is not a record file: {reason_of(error)}") from error
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        shown = shortened(found, plain=True)
        raise RecordError(f"{path}: has schema '{shown}', expected '{SCHEMA}'; remove it or write it anew")
    return load_json(path, _File, otherwise="remove it or write it anew").records


def read_all(folder: Path | str) -> list[Record]:
    """Records of every `*.json` file in a folder, sorted by file name."""
    files: Iterable[Path] = sorted(Path(folder).glob("*.json"))
    return [record for file in files for record in read_records(file)]
