"""Training of a model as a configuration says: from the beginning, or from the newest checkpoint of the run folder.

The run folder describes itself: `config.yaml` (every value of the newest session), `run.json` (each session: first
batch, configuration, log, command, machine, versions; read by `axonn.training.session_history`), `batches.jsonl` and
`evaluations.jsonl`, `checkpoints/`, `spans-K.parquet/`, `log.txt`, at the end `record.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from axonn.checkpoint.checkpoints import Checkpoint, clean, latest, remove_all
from axonn.config.loading import dotted
from axonn.config.train_config import TrainConfig, validate
from axonn.data import Dataset
from axonn.data.order import held_out_of
from axonn.device.devices import DeviceType
from axonn.distributed.launch import find_mpiexec
from axonn.durable_files import locked_folder, replace_durably
from axonn.errors import CheckpointError
from axonn.models.registry import make_model
from axonn.models.weights_file import check_weights
from axonn.observability.records import Record, Workload, write_records
from axonn.training.framework import Framework, load_framework, ran_by, settings_ran
from axonn.training.provenance import this_machine
from axonn.training.resumption import CHECKPOINTS
from axonn.training.run_outcome import Outcome
from axonn.training.run_record import parts_of
from axonn.training.session_history import NEWEST_LOG, RUN_FILE, entries_of, with_logs
from axonn.training.supervision.interruption import noted
from axonn.training.supervision.supervisor import kept_log, supervise

FRAMEWORK = "axonn"
_MAY_CHANGE = {
    "activation_checkpointing",
    "checkpoints",
    "compile",
    "evaluation",
    "grid",
    "microbatch_size",
    "overdecomposition",
    "optimizer.bsize",
    "optimizer.buckets_resident",
    "optimizer.k",
    "optimizer.placement",
    "schedule",
    "stall_limit_s",
    "steps",
    "transport",
}
"""Keys that change how a run is computed, or how long it is, but not what it computes."""
_PARTS_FROM = 200
"""Batches at the end of a session, at most, from which the parts of its time are taken."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One start of a training run, checked and ready to train."""

    config: TrainConfig
    folder: Path
    command: str
    resume: Checkpoint | None
    device: DeviceType = "cpu"
    config_file: str | None = None
    """The configuration file, as `axonn.training.places.recorded` names it."""

    @property
    def first(self) -> int:
        """Number of the first batch to train."""
        return 0 if self.resume is None else self.resume.state.batches


def resolved(config: TrainConfig) -> TrainConfig:
    """Return the configuration with the values that follow from other keys filled in."""
    return config.model_copy(update={"data": config.data.model_copy(update={"held_out": held_out_of(config)})})


def prepare(
    config: TrainConfig,
    folder: Path,
    *,
    data: Dataset,
    command: str,
    fresh: bool,
    warn: Callable[[str], None],
    device: DeviceType = "cpu",
    config_file: str | None = None,
) -> Session:
    """Return the session that starts or resumes the run; changes nothing on disk.

    `config` is `resolved`, `data` its data. Raises `CheckpointError` when the checkpoints of the folder belong to a run
    with another configuration, or the initial weights are not those of the model, and `LaunchError` when there is no
    MPI to start several ranks with.
    """
    if config.grid.size > 1:
        find_mpiexec()
    resume = None if fresh else latest(folder / CHECKPOINTS, warn=warn)
    if resume is not None:
        differences = config_differences(resume, config, data)
        if differences:
            raise CheckpointError(
                f"{folder} holds a run with another configuration: {'; '.join(differences)}; "
                "change it back, choose another --out, or start anew with --fresh, which removes its checkpoints"
            )
    elif config.initial_weights is not None:
        check_weights(config.initial_weights, make_model(config.model))
    return Session(config=config, folder=folder, command=command, resume=resume, device=device, config_file=config_file)


def config_differences(checkpoint: Checkpoint, config: TrainConfig, data: Dataset) -> list[str]:
    """Return the differences that keep `config` from going on with a checkpoint, as text."""
    where = str(checkpoint.folder)
    saved = _flat(validate(checkpoint.state.config, TrainConfig, where=where))
    now = _flat(config)
    differences = [
        f"{key} was {_shown(saved.get(key))}, is {_shown(now.get(key))}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and key != "data.path" and not _is_free(key)
    ]
    if checkpoint.state.data_digest != data.digest:
        paths = [_shown(values.get("data.path")) for values in (saved, now)]
        differences.append(f"the content of data.path differs (was {paths[0]}, is {paths[1]})")
    return differences


def train(
    session: Session,
    *,
    fresh: bool,
    on_batch: Callable[[int], None] = lambda done: None,
    on_stop: Callable[[str], None] = lambda why: None,
    on_warning: Callable[[str], None] = lambda text: None,
) -> Record:
    """Train to the end of the configuration and write the record, also of a failure or an interruption.

    With `fresh`, checkpoints of an earlier run are removed. A run with `checkpoints` saves one when it is interrupted;
    `on_stop` is called with the reason before it does. An interruption is raised once the record is written. Raises
    `LaunchError` when another run uses the folder.
    """
    framework = load_framework(FRAMEWORK)
    with locked_folder(session.folder, "wait for its end, or choose another --out"), noted() as pending:
        checkpoints = session.folder / CHECKPOINTS
        if fresh:
            remove_all(checkpoints)
        clean(checkpoints)
        _describe(session, framework)
        outcome = supervise(
            FRAMEWORK,
            session.config,
            session.folder,
            timeout_s=float("inf"),
            on_batch=on_batch,
            resume=session.resume,
            device=session.device,
            pending=pending,
            on_stop=None if session.config.checkpoints is None else on_stop,
            on_warning=on_warning,
        )
        if outcome.failure is None:
            # The run came to its end in spite of the signal.
            pending.settle()
        return _write_record(session, framework, outcome)


def _write_record(session: Session, framework: Framework, outcome: Outcome) -> Record:
    config = session.config
    grid = config.grid
    times, losses = outcome.batch_times_s[session.first :], outcome.losses[session.first :]
    warmup = 1 if len(times) > 1 else 0
    mean = sum(times[warmup:]) / len(times[warmup:]) if times and outcome.failure is None else None
    asked = Workload.of(config.model, gpus=grid.size, batch_size=config.batch_size, precision=config.precision.compute)
    recompute = config.activation_checkpointing is not None

    def tflops(*, recompute: bool) -> float | None:
        return None if mean is None else asked.flops(recompute=recompute) / mean / grid.size / 1e12

    record = Record(
        kind="measured",
        experiment="train",
        point=session.folder.name,
        asked=asked,
        ran=(ran := ran_by(framework, config)),
        settings=settings_ran(config, ran),
        machine=this_machine(device=session.device),
        source=session.command,
        batch_time_s=mean,
        batch_times_s=times,
        warmup_batches=warmup,
        losses=losses,
        parts_s={} if mean is None else _parts(session),
        memory_bytes=outcome.memory_bytes,
        bytes_per_batch=outcome.bytes_per_batch,
        usage=outcome.usage,
        tflops_formula=config.model.flops_formula(recompute=recompute),
        tflops_per_gpu=tflops(recompute=True) if recompute else None,
        tflops_per_gpu_without_recompute=tflops(recompute=False),
        created=_now(),
        run_folder=str(session.folder),
        failure=outcome.failure,
        note=f"batches {session.first} to {session.first + len(times) - 1}" if session.first and times else None,
    )
    write_records(session.folder / "record.json", [record])
    return record


def _parts(session: Session) -> dict[str, float]:
    """Return the seconds of a batch by part, from the last batches that no evaluation or checkpoint interrupts."""
    config = session.config
    first = max(session.first, config.steps - _PARTS_FROM)
    for every in (config.evaluation and config.evaluation.every, config.checkpoints and config.checkpoints.every):
        if every:
            first = max(first, (config.steps - 1) // every * every)
    # The first batch of a session is slow.
    if first == session.first and first + 1 < config.steps:
        first += 1
    return parts_of(session.folder, config, first=first, last=config.steps)


def _describe(session: Session, framework: Framework) -> None:
    """Write `config.yaml` and add this session to `run.json`."""
    text = yaml.safe_dump(session.config.model_dump(mode="json"), sort_keys=False)
    replace_durably(session.folder / "config.yaml", text)
    path = session.folder / RUN_FILE
    earlier = [] if session.resume is None else with_logs(entries_of(session.folder), kept_log(session.folder))
    this = {
        "started": _now(),
        "command": session.command,
        "config_file": session.config_file,
        "first_batch": session.first,
        "checkpoint": None if session.resume is None else str(session.resume.folder),
        "framework": framework.label,
        "version": framework.version(),
        "grid": session.config.grid.extents(),
        "config": session.config.model_dump(mode="json"),
        "log": NEWEST_LOG,
        "machine": this_machine(device=session.device).model_dump(exclude_none=True),
        "tflops_formula": session.config.model.flops_formula(
            recompute=session.config.activation_checkpointing is not None
        ),
    }
    replace_durably(path, json.dumps({"schema": "axonn-run/1", "sessions": [*earlier, this]}, indent=1) + "\n")


def taken_by_default(config: TrainConfig) -> dict[str, str]:
    """Return the defaults of keys that the configuration's file leaves out and that change what is computed: dotted
    keys and their values."""
    written = dict(dotted(config.model_dump(mode="json", exclude_unset=True)))
    defaults = {key: _shown(value) for key, value in _flat(config).items() if key not in written and not _is_free(key)}
    defaults.pop("model.kind", None)
    return defaults | ({"data.path": config.model.default_data} if "data.path" in defaults else {})


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _MAY_CHANGE)


def _flat(config: TrainConfig) -> dict[str, Any]:
    """Return dotted keys and their values; settings that can be written in several ways are normalised."""
    values = resolved(config).model_dump(mode="json")
    rate = values["optimizer"]["schedule"]
    if rate["name"] == "constant":
        rate.pop("decay_until")
    elif rate["decay_until"] is None:
        rate["decay_until"] = config.steps
    precision = config.precision
    values["precision"] |= {
        "compute": precision.compute,
        "master": precision.master_type,
        "gradients": precision.gradient_type,
        "loss_scale": precision.scaling,
    }
    return dict(dotted(values))


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
