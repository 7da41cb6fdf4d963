"""Launch on a cluster of runs whose ranks are this suite's own, and reading of their results.

The folder in which such a run is started is a run folder: it has `spec.json`, and every rank writes its files there
(`axonn.training.run_folder`). Those files and the output of the ranks, in any order, are read afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from axonn.config.train_config import DataConfig, TrainConfig
from axonn.device.devices import DeviceType
from axonn.errors import LaunchError
from axonn.training.framework import ClusterWork, Launch, PrintedRun
from axonn.training.metrics import BATCHES
from axonn.training.run_folder import SPEC
from axonn.training.supervision.log_failures import failure_of

LARGEST_TOKEN = 65_535
"""Largest token of a file of uint16."""
READ_LATER = f"the ranks print no times: to read the run, {BATCHES} and rank-*.json are part of its output"


def spec_of(
    framework: str,
    config: TrainConfig,
    *,
    checkpoint: str | None = None,
    turns: bool = False,
    device: DeviceType = "cpu",
    stoppable: bool = False,
) -> str:
    """Return the content of the `spec.json` of a run folder.

    `checkpoint`: the one to go on from, or `NEWEST`. `stoppable`: whether the ranks look for the file `STOP` between
    batches, and end with the status `STOPPED` when it exists.
    """
    grid = config.grid
    spec = {
        "framework": framework,
        "config": config.model_dump(mode="json"),
        "ranks": grid.size,
        "checkpoint": checkpoint,
        "turns": turns,
        "device": device,
        "stoppable": stoppable,
    }
    return json.dumps(spec, indent=1)


def launch_worker(
    framework: str,
    config: TrainConfig,
    *,
    device: DeviceType = "cpu",
    notes: Sequence[str] = (),
    checkpoint: str | None = None,
    stoppable: bool = False,
    messages_over_mpi: bool = False,
) -> Launch:
    """Return the launch by which every rank of `config` runs the suite's worker on `device`.

    `checkpoint` and `stoppable`: see `spec_of`. `messages_over_mpi`: whether stages send their messages over MPI,
    straight from device memory.
    """
    requirements = [
        "python is that of this suite's environment, and the folder in which it is started is one that all ranks see"
    ]
    return Launch(
        command=["python", "-m", "axonn.training.worker", "."],
        files={SPEC: spec_of(framework, config, checkpoint=checkpoint, device=device, stoppable=stoppable)},
        mpi_on_device=messages_over_mpi and device == "cuda",
        notes=[*notes, *requirements, READ_LATER],
    )


def data_of(work: ClusterWork) -> tuple[DataConfig, list[str]]:
    """Return where ranks of this suite find the tokens or images of `work`, with notes on them.

    Raises `LaunchError` when a file of tokens cannot hold the vocabulary.
    """
    vocab = work.model.token_vocab
    if vocab is None:
        # The data of a site is text.
        return DataConfig(), [f"the {work.model.sample_unit} are {work.model.default_data}"]
    if work.data is None:
        return DataConfig(), ["the tokens are bytes of Python's own sources"]
    if vocab > LARGEST_TOKEN + 1:
        raise LaunchError(
            f"{work.model.name} has {vocab} tokens, and files of tokens hold {LARGEST_TOKEN + 1}: "
            "take a smaller vocabulary, or synthetic tokens"
        )
    # Megatron-LM writes uint16 for vocabularies below 65,500 (megatron/core/datasets/indexed_dataset.py).
    path = f"{work.data}.bin"
    return DataConfig(path=path), [f"{path} holds uint16 tokens, as Megatron-LM's tools write it"]


def read_run(lines: Iterable[str]) -> PrintedRun:
    """Parse the lines of a run's files and output, which may be cut short or mixed between ranks."""
    batches: dict[int, dict[str, Any]] = {}
    states: list[dict[str, Any]] = []
    printed: list[str] = []
    for line in lines:
        content = _object_in(line)
        if content.keys() >= {"step", "loss", "seconds"}:
            batches[content["step"]] = content
        elif content.keys() >= {"state", "time"}:
            states.append(content)
        else:
            printed.append(line)
    ordered = [batches[step] for step in sorted(batches)]
    endings = {state["state"] for state in states}
    finished = endings == {"done"}
    # A launcher reports the exit status of stopped ranks as an error, which it is not.
    stopped = "stopped" in endings and endings <= {"stopped", "done"}
    return PrintedRun(
        seconds=[batch["seconds"] for batch in ordered],
        starts=[place for place, batch in enumerate(ordered) if batch.get("first")],
        losses=[batch["loss"] for batch in ordered],
        memory_bytes=max((state["memory_bytes"] for state in states if "memory_bytes" in state), default=None),
        finished=finished,
        failure=None if finished or stopped else failure_of([*_raised(states), *printed]),
    )


def _raised(states: Iterable[dict[str, Any]]) -> list[str]:
    """Return why ranks failed, first failure first, as tracebacks, so that it is weighed like printed ones."""
    failed = sorted((state for state in states if state["state"] == "failed"), key=lambda state: state["time"])
    return [line for state in failed for line in ("Traceback (most recent call last):", state["detail"])]


def _object_in(line: str) -> dict[str, Any]:
    """Return the JSON object of a line, after any prefix of a launcher; empty where there is none."""
    start = line.find("{")
    if start < 0:
        return {}
    try:
        value, _ = json.JSONDecoder().raw_decode(line, start)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
